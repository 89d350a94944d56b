"""Who callers are: each call has one `Caller`, whom the access record, the log, the fair shares and the limits name.

`interceptors.py` finds it out before a message is read, and makes it the current one.
"""

from __future__ import annotations

from camserve.server.callers.caller import Caller, Role, anonymous, current_caller, set_caller

__all__ = ["Caller", "Role", "anonymous", "current_caller", "set_caller"]

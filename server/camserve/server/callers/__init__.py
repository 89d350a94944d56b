"""Who callers are, and what each may take: each call has one `Caller`, whom the record, the log, the shares and the limits name.

`interceptors.py` finds it out before a message is read, makes it the current one, and sends what it asks through the `Turnstile`.
"""

from __future__ import annotations

from camserve.server.callers.caller import Caller, Role, anonymous, current_caller, set_caller
from camserve.server.callers.limits import CallerLimits

__all__ = ["Caller", "CallerLimits", "Role", "anonymous", "current_caller", "set_caller"]

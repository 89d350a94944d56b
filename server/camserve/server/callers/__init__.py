"""Who callers are, and what each may take: each call has one `Caller`, whom the record, the log, the shares and the limits name.

`interceptors.py` asks the `Guard` before a message is read: by an API key (`api_keys.py`), a token (`tokens.py`), a client
certificate (`certificates.py`) or just an address. `roles.py` is the table of what each rpc asks for. What is asked then goes
through the `Turnstile`.
"""

from __future__ import annotations

from camserve.server.callers.caller import Caller, Role, anonymous, current_caller, set_caller
from camserve.server.callers.guard import Guard
from camserve.server.callers.limits import CallerLimits

__all__ = ["Caller", "CallerLimits", "Guard", "Role", "anonymous", "current_caller", "set_caller"]

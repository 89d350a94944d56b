"""Whose health a caller may ask for: everybody the whole server's, and that of a model only who may explain with it.

Probes and balancers can carry no credentials, so that the rpc is open; which models there are is nobody else's business. `app.py`
gives it to `health.py`.
"""

from __future__ import annotations

from camserve.server.callers.caller import Role, current_caller
from camserve.server.errors import PermissionDenied, Reason, Unauthenticated

__all__ = ["check_health_name"]

_OF_MODELS = "camserve/"


def check_health_name(name: str) -> None:
    """Looks at the current caller.

    Raises:
        Unauthenticated: it sent no credentials, and anonymous callers may not explain.
        PermissionDenied: it may not explain.
    """
    caller = current_caller()
    if not name.startswith(_OF_MODELS) or Role.EXPLAIN in caller.roles:
        return
    if caller.how == "anonymous":
        raise Unauthenticated(
            Reason.CREDENTIALS_MISSING,
            "without credentials only the state of the whole server is told; ask for the empty name, or send credentials",
        )
    raise PermissionDenied(
        Reason.ROLE_MISSING,
        f"the state of a model is told to the role explain, which {caller.name!r} has not; ask for the empty name",
        metadata={"role": Role.EXPLAIN, "caller": caller.name},
    )

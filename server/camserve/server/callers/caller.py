"""One caller, and what it may do. `interceptors.py` sets it for each call; whoever works on the call reads it."""

from __future__ import annotations

import contextvars
import dataclasses
import enum

__all__ = ["Caller", "Role", "anonymous", "current_caller", "name_complaint", "set_caller"]

# How gRPC writes addresses, which are the names of anonymous callers.
_ADDRESSES = ("ipv4:", "ipv6:", "unix:", "unix-abstract:")
_LONGEST_NAME = 128

_current: contextvars.ContextVar[Caller] = contextvars.ContextVar("camserve_caller")


class Role(enum.StrEnum):
    """What a caller may do. None contains another."""

    EXPLAIN = "explain"
    """Ask for predictions and explanations, and read what models there are."""
    ADMIN = "admin"
    """Load and unload models."""
    AUDIT = "audit"
    """Read what was recorded of others' requests."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who makes a call.

    Attributes:
        name: who it is, the same for all of its connections: what shares are counted by.
        roles: what it may do.
        how: by what it was recognised: `api-key`, `token`, `certificate` or `anonymous`.
    """

    name: str
    roles: frozenset[Role]
    how: str


def anonymous(peer: str, roles: frozenset[Role] = frozenset(Role)) -> Caller:
    """A caller of whom only the address is known: a host, however many connections it opens.

    Args:
        peer: the address as gRPC writes it, such as `ipv4:10.0.0.7:51234`, `ipv6:%5B::1%5D:51234` or `unix:`.
        roles: what it may do.
    """
    name = peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
    return Caller(name=name, roles=roles, how="anonymous")


def name_complaint(name: str) -> str:
    """Why nobody but a host may be called so, or an empty text. Names stand in logs and share with others by equality."""
    if not 0 < len(name) <= _LONGEST_NAME:
        return f"a caller's name has 1 to {_LONGEST_NAME} characters"
    if not name.isprintable() or name != name.strip():
        return "a caller's name has printable characters only, and no space around it"
    if name.startswith(_ADDRESSES):
        return f"a caller's name does not begin like an address, with {', '.join(_ADDRESSES)}"
    return ""


def set_caller(caller: Caller) -> None:
    """Makes a caller that of the current call; grpc.aio runs each call in a context of its own."""
    _current.set(caller)


def current_caller() -> Caller:
    """The current call's caller."""
    return _current.get()

"""Decides of each call who makes it and whether that caller may, before a message of it is read.

`interceptors.py` asks twice: at the gate with what the call's metadata tells, and inside with the connection too. Most of those
who are turned away are turned away at the gate, where nothing that they send has been received. Pure but for the files behind it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from camserve.server.callers.api_keys import caller_of_key
from camserve.server.callers.caller import Caller, Role, anonymous
from camserve.server.callers.caller_file import CertificateEntry, KeyEntry
from camserve.server.callers.certificates import caller_of_certificate
from camserve.server.callers.roles import ROLE_OF
from camserve.server.errors import PermissionDenied, Reason, Unauthenticated

__all__ = ["Guard"]

# A JSON Web Token has three parts; our keys have no point.
_POINTS_OF_A_TOKEN = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Who may do what.

    Attributes:
        keys: tells the API keys as they are now; None where none are taken.
        caller_of_token: reads a token; None where none are taken.
        certificates: tells whose certificates count as they are now; None where none are asked for.
        anonymous_roles: of those who send no credentials; none where they are refused.
        role_of: the role that each rpc asks for.
    """

    keys: Callable[[], tuple[KeyEntry, ...]] | None = None
    caller_of_token: Callable[[str], Caller] | None = None
    certificates: Callable[[], tuple[CertificateEntry, ...]] | None = None
    anonymous_roles: frozenset[Role] = frozenset(Role)
    role_of: Mapping[str, Role | None] = dataclasses.field(default_factory=lambda: ROLE_OF)

    @property
    def asks_for_credentials(self) -> bool:
        """Whether there are callers with names."""
        return not (self.keys is None and self.caller_of_token is None and self.certificates is None)

    def at_the_gate(self, rpc: str, metadata: Iterable[tuple[str, Any]]) -> Caller | None:
        """Who a call's metadata says its caller is; None where only the connection can tell.

        Raises:
            Unauthenticated: the credentials are wrong, or missing where nothing else could tell.
            PermissionDenied: the caller may not call this.
        """
        caller = self._shown(metadata)
        if caller is None and self.certificates is not None:
            return None
        self._check(rpc, caller or anonymous("", self.anonymous_roles))
        return caller

    def inside(
        self, rpc: str, caller: Caller | None, *, peer: str, connection: Callable[[], Mapping[str, Any]]
    ) -> Caller:
        """Who makes a call, with all that is known.

        Args:
            rpc: full method name.
            caller: as the gate said.
            peer: the caller's address.
            connection: tells what is known of the connection: gRPC's auth context.

        Raises:
            Unauthenticated: credentials are missing.
            PermissionDenied: the caller may not call this.
        """
        if caller is None and self.certificates is not None:
            caller = caller_of_certificate(connection(), self.certificates())
        caller = caller or anonymous(peer, self.anonymous_roles)
        self._check(rpc, caller)
        return caller

    def _shown(self, metadata: Iterable[tuple[str, Any]]) -> Caller | None:
        if not self.asks_for_credentials:
            return None  # There is nothing to compare them with.
        sent = [(name, value) for name, value in metadata if name in {"authorization", "x-api-key"}]
        if not sent:
            return None
        if len(sent) > 1:
            raise _invalid("more than one was sent; send a single authorization or x-api-key")
        ((name, credential),) = sent
        if name == "authorization":
            scheme, _, credential = credential.partition(" ")
            credential = credential.strip()
            if scheme.lower() != "bearer" or not credential:
                raise _invalid("authorization has to be 'Bearer ' and a key or a token")
            if credential.count(".") == _POINTS_OF_A_TOKEN:
                if self.caller_of_token is None:
                    raise _invalid(f"this server takes no tokens; send {self._taken()}")
                return self.caller_of_token(credential)
        if self.keys is None:
            raise _invalid(f"this server takes no API keys; send {self._taken()}")
        return caller_of_key(credential, self.keys(), now=time.time())

    def _check(self, rpc: str, caller: Caller) -> None:
        if rpc not in self.role_of:
            raise PermissionDenied(
                Reason.ROLE_MISSING, f"nobody may call {rpc}: this server knows no role for it", metadata={"rpc": rpc}
            )
        role = self.role_of[rpc]
        if role is None or role in caller.roles:
            return
        if caller.how == "anonymous":
            raise Unauthenticated(
                Reason.CREDENTIALS_MISSING,
                f"{rpc} needs the role {role!s}, and this call carries no credentials; send {self._taken()}",
                metadata={"rpc": rpc, "role": role},
            )
        raise PermissionDenied(
            Reason.ROLE_MISSING,
            f"{rpc} needs the role {role!s}, and {caller.name!r} has {_listed(caller.roles)}; ask whoever runs this server",
            metadata={"rpc": rpc, "role": role, "caller": caller.name},
        )

    def _taken(self) -> str:
        """What callers may send, in words."""
        ways = [
            *(["an API key as x-api-key or authorization: Bearer"] if self.keys is not None else []),
            *(["a token as authorization: Bearer"] if self.caller_of_token is not None else []),
            *(["a client certificate of an authority that it trusts"] if self.certificates is not None else []),
        ]
        return " or ".join(ways) or "nothing: it knows no callers by name, and only its own machine may do this"


def _invalid(why: str) -> Unauthenticated:
    return Unauthenticated(Reason.CREDENTIALS_INVALID, f"the credentials are not accepted: {why}")


def _listed(roles: frozenset[Role]) -> str:
    return ", ".join(role for role in Role if role in roles) or "none"

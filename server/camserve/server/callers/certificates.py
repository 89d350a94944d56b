"""Client certificates: which caller one is. Pure; gRPC has verified it against the authorities by then, and `guard.py` asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from camserve.server.callers.caller import Caller, Role, name_complaint
from camserve.server.callers.caller_file import CertificateEntry
from camserve.server.errors import PermissionDenied, Reason

__all__ = ["ANY_CERTIFICATE", "caller_of_certificate"]

# Without a file that names callers, whoever the authority has certified may explain.
ANY_CERTIFICATE = (CertificateEntry(identity="*", roles=frozenset({Role.EXPLAIN})),)


def caller_of_certificate(
    properties: Mapping[str, Iterable[bytes]], entries: Iterable[CertificateEntry]
) -> Caller | None:
    """Who a certificate belongs to; None where none was shown.

    Args:
        properties: of the connection, as gRPC's auth context tells them.
        entries: those that are known.

    Raises:
        PermissionDenied: it is nobody's who is known here.
    """
    identities = _identities(properties)
    if not identities:
        return None
    for entry in entries:
        if entry.identity == "*" or entry.identity in identities:
            name = entry.name or (identities[0] if entry.identity == "*" else entry.identity)
            if not name_complaint(name):
                return Caller(name=name, roles=entry.roles, how="certificate")
    shown = ", ".join(map(repr, identities))
    raise PermissionDenied(
        Reason.ROLE_MISSING,
        f"the certificate of {shown} is nobody's who is known here; a [[certificate]] in the server's file of callers names it",
        metadata={"identity": identities[0]},
    )


def _identities(properties: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """URI and DNS names; the common name only where there is none of these, as RFC 9525 has it."""
    names = [*properties.get("peer_uri", ()), *properties.get("peer_dns", ())]
    names = names or list(properties.get("x509_common_name", ()))
    return tuple(name.decode(errors="replace") for name in names)

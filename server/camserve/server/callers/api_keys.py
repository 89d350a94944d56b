"""API keys: made here, kept as hashes, and found again. Pure; `guard.py` asks, `command.py` makes."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from camserve.server.callers.caller import Caller
from camserve.server.callers.caller_file import KeyEntry
from camserve.server.errors import Reason, Unauthenticated

__all__ = ["caller_of_key", "digest_of", "new_key"]

# Found by those who search for secrets that were published by mistake.
_PREFIX = "camserve_"
_KEY_BYTES = 32


def new_key() -> str:
    """A key of 256 random bits, in letters that every header and shell takes."""
    return f"{_PREFIX}{secrets.token_urlsafe(_KEY_BYTES)}"


def digest_of(key: str) -> str:
    """What is kept of a key: SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def caller_of_key(key: str, entries: Sequence[KeyEntry], *, now: float) -> Caller:
    """Who a key belongs to.

    Args:
        key: as it was sent.
        entries: of the keys that are known.
        now: seconds since 1970.

    Raises:
        Unauthenticated: nobody's, expired, or not valid yet. The text never holds the key.
    """
    digest = digest_of(key)
    # All are looked at, whichever matches: how long it takes tells nothing.
    matches = [entry for entry in entries if hmac.compare_digest(entry.sha256, digest)]
    if not matches:
        raise Unauthenticated(
            Reason.CREDENTIALS_INVALID,
            "nobody has this API key: it is mistyped, or was revoked; ask whoever runs this server for one",
        )
    entry = matches[0]
    if entry.expires is not None and now >= entry.expires.timestamp():
        raise Unauthenticated(
            Reason.CREDENTIALS_EXPIRED,
            f"this API key of {entry.name!r} expired at {entry.expires.isoformat()}; ask whoever runs this server for a new one",
            metadata={"caller": entry.name},
        )
    if entry.not_before is not None and now < entry.not_before.timestamp():
        raise Unauthenticated(
            Reason.CREDENTIALS_NOT_YET_VALID,
            f"this API key of {entry.name!r} is valid from {entry.not_before.isoformat()} on; try again then",
            metadata={"caller": entry.name},
        )
    return Caller(name=entry.name, roles=entry.roles, how="api-key")

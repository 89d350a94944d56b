"""Which requests a rule takes: a pure function of its name and the request's id, so that anybody can work it out again."""

from __future__ import annotations

import hashlib
from typing import Final

__all__ = ["is_sampled"]

_BYTES: Final = 8


def is_sampled(rule: str, request_id: str, share: float) -> bool:
    """Whether a rule takes a request.

    The first 8 bytes of SHA-256 over `<rule>`, a line feed and `<request id>`, read as a big-endian number, are below
    `share * 2**64`. A request that is sent again under its id has the same fate; rules of the same share take other requests.

    Args:
        rule: name.
        request_id: the caller's, or the one made for it.
        share: 0 takes none, 1 all.
    """
    digest = hashlib.sha256(f"{rule}\n{request_id}".encode()).digest()
    # Exact: the product only moves the exponent, and Python compares whole numbers with floats by value.
    return int.from_bytes(digest[:_BYTES], "big") < share * 2.0 ** (8 * _BYTES)

"""Cuts large arrays into bands, so that work on a whole picture needs temporary memory for a few of its rows only.

Used by the decode and encode stages. What is worked out band by band is the same to the last bit as in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["bands"]

# Small enough for the temporaries of a step to stay in a core's cache, large enough that looping costs nothing.
_ELEMENTS = 1 << 17


def bands(rows: int, row_elements: int = 1) -> Iterator[slice]:
    """Yields consecutive slices that cover `rows` rows of `row_elements` elements each; at least one row a slice."""
    step = max(1, _ELEMENTS // max(1, row_elements))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))

"""The pointing game: does a map's highest cell lie on the flaw?

Arrives: a map at any resolution and the truth mask. Leaves: hit or miss. `evaluate.py` publishes the rate, tests of the
server ask it of the maps they receive. See Zhang et al., "Top-down neural attention by excitation backprop" (2016), who
allow 15 pixels of tolerance on pictures whose shorter side is about 224; we scale that tolerance with the picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["TOLERANCE", "chance", "pointing_hit"]

TOLERANCE = 15 / 224
"""Allowed distance from the flaw, as a fraction of the picture's shorter side."""


def pointing_hit(values: ArrayLike, mask: NDArray[np.bool_]) -> bool:
    """Says whether a map points at the flaw.

    The map is taken to cover the whole picture in equal cells. Its first highest cell's centre must lie within
    `TOLERANCE` of a pixel of the mask.

    Args:
        values: the map, shape (i, j), any resolution and scale.
        mask: True on the flaw, shape (h, w).

    Returns:
        True for a hit. A constant map points nowhere, and so does a map with a value that is not finite: False.

    Raises:
        ValueError: the map is not two-dimensional, or the mask is empty: there is nothing to point at.
    """
    cells = np.asarray(values, dtype=np.float64)
    if cells.ndim != 2 or cells.size == 0:
        raise ValueError(f"a map of shape (i, j) is needed, not {cells.shape}")
    if not mask.any():
        raise ValueError("the mask is empty: a good surface has no flaw to point at")
    if not np.isfinite(cells).all() or cells.min() == cells.max():
        return False
    row, column = np.unravel_index(int(cells.argmax()), cells.shape)
    y = (row + 0.5) * mask.shape[0] / cells.shape[0] - 0.5
    x = (column + 0.5) * mask.shape[1] / cells.shape[1] - 0.5
    flaw_y, flaw_x = np.nonzero(mask)
    nearest = np.hypot(flaw_y - y, flaw_x - x).min()
    return bool(nearest <= TOLERANCE * min(mask.shape))


def chance(mask: NDArray[np.bool_], cells: int = 20) -> float:
    """Gives the hit rate of a map that points at a random one of `cells` x `cells` cells: what luck alone scores."""
    hits = 0
    for index in range(cells * cells):
        values = np.zeros(cells * cells)
        values[index] = 1
        hits += pointing_hit(values.reshape(cells, cells), mask)
    return hits / cells**2

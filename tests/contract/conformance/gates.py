"""How near an answer must come, and why: one `Gate` for each method of each library.

`relative` is the measure unless a gate says otherwise: the largest difference anywhere, as a share of the reference's largest
magnitude.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def relative(expected: Array, got: Array) -> float:
    """Largest difference as a share of the largest magnitude expected; of a reference that is zero, the largest value."""
    if expected.shape != got.shape:
        raise AssertionError(f"a map of {got.shape} cannot be held against one of {expected.shape}")
    # A NaN anywhere must not pass: maxima of it are NaN, which no bound admits.
    largest = float(np.abs(expected.astype(np.float64)).max())
    return float(np.abs(expected.astype(np.float64) - got).max()) / (largest or 1.0)


def up_to_sign(expected: Array, got: Array) -> float:
    """`relative` of whichever sign is nearer."""
    return min(relative(expected, got), relative(expected, -got))


def decorrelation(expected: Array, got: Array) -> float:
    """1 - r."""
    return 1 - float(np.corrcoef(expected.ravel(), got.ravel())[0, 1])

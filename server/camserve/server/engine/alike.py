"""How alike two forms of one computation must be: outputs to rounding, activations, gradients and maps as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "correlation", "difference", "least_correlation"]

TOLERANCE: Final[Mapping[torch.dtype, float]] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
"""Largest difference of an output, relative to the largest: rounding through some hundred layers, seen up to a tenth of these."""

# Gradients go through gates of ReLUs that rounding may flip, a cell at a time: alike means alike as pictures.
_LEAST_CORRELATION: Final = {torch.bfloat16: 0.98, torch.float16: 0.995}
_USUAL_CORRELATION: Final = 0.999


def least_correlation(dtype: torch.dtype) -> float:
    """What activations, gradients and maps of a program of this dtype must reach."""
    return _LEAST_CORRELATION.get(dtype, _USUAL_CORRELATION)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest of any value, relative to the largest of `other`; infinity for other shapes and for what is not finite."""
    if one.shape != other.shape:
        return float("inf")
    scale = float(other.double().abs().amax()) or 1.0
    found = float((one.double() - other.double()).abs().amax()) / scale
    return float("inf") if math.isnan(found) else found


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, over all values; 1 for two that are the same."""
    if one.shape != other.shape:
        return 0.0
    flat = [value.double().flatten() for value in (one, other)]
    centred = [value - value.mean() for value in flat]
    norm = centred[0].norm() * centred[1].norm()
    if norm == 0:
        return 1.0 if torch.allclose(flat[0], flat[1]) else 0.0
    return float((centred[0] * centred[1]).sum() / norm)

"""Arithmetic that all families share. Half precision is widened to float32 before the first sum; float64 stays."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["given", "sum_space", "widen"]


def widen(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half formats become float32: g squared underflows in float16, and sums over cells lose their small terms."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def sum_space(values: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *ones"]:
    """Sums each channel over its cells and keeps the axes, so that the result multiplies the channel."""
    return values.sum(dim=tuple(range(2, values.ndim)), keepdim=True)


def given(value: Tensor | None, what: str) -> Tensor:
    """The value, widened.

    Raises:
        ValueError: the engine did not capture what the method says it needs.
    """
    if value is None:
        raise ValueError(f"this method is computed from a {what}; see Method.needs")
    return widen(value)

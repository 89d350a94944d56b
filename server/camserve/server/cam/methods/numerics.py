"""Arithmetic that all families share. Half precision is widened to float32 before the first sum; float64 stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.errors import Reason, Unsupported

__all__ = ["enlarge", "given", "positive_part", "sum_space", "widen"]

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def widen(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half formats become float32: g squared underflows in float16, and sums over cells lose their small terms."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def sum_space(values: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *ones"]:
    """Sums each channel over its cells and keeps the axes, so that the result multiplies the channel."""
    return values.sum(dim=tuple(range(2, values.ndim)), keepdim=True)


def positive_part(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """ReLU, which lets minus infinity through as well: dropped, it would be hidden from the flags."""
    return torch.where(values == -torch.inf, values, values.clamp_min(0))


def enlarge(
    values: Float[Tensor, "b c *space"], shape: Sequence[int], *, aligns_corners: bool = False
) -> Float[Tensor, "b c *new_space"]:
    """Interpolates linearly along each axis, without antialiasing.

    Args:
        values: of a layer.
        shape: the spatial axes wanted.
        aligns_corners: whether the outermost cells' centres stay on the corners; otherwise cell centres lie at half positions,
            as in `maps.resize`.

    Raises:
        Unsupported: the layer has other spatial axes than what it is laid over, or more than three.
    """
    axes = values.ndim - 2
    if axes != len(shape) or axes not in _INTERPOLATION:
        raise Unsupported(
            Reason.LAYER_UNUSABLE,
            f"a layer with {axes} spatial axes cannot be laid over an input with {len(shape)}; choose a layer that has the "
            f"input's axes, of which there may be one to three",
            metadata={"layerAxes": axes, "inputAxes": len(shape)},
        )
    mode = _INTERPOLATION[axes]
    return torch.nn.functional.interpolate(values, size=tuple(shape), mode=mode, align_corners=aligns_corners)


def given(value: Tensor | None, what: str) -> Tensor:
    """The value, widened.

    Raises:
        ValueError: the engine did not capture what the method says it needs.
    """
    if value is None:
        raise ValueError(f"this method is computed from a {what}; see Method.needs")
    return widen(value)

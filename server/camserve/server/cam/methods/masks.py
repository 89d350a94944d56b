"""Masks and what they are made of: enlarged activations, sliding windows, random grids, blur.

Pure functions of tensors with any one to three spatial axes; the perturbation methods multiply the input by what these return.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from camserve.server.errors import Reason, Unsupported

__all__ = ["blur", "enlarge", "random_grids", "random_masks", "ranges", "stretch", "window_masks", "window_starts"]

# As in `maps.is_constant`.
_ROUNDING_STEPS = 16
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def enlarge(
    maps: Float[Tensor, "n c *space"], shape: Sequence[int], *, aligns_corners: bool = False
) -> Float[Tensor, "n c *shape"]:
    """Interpolates linearly along each axis; by default cell centres lie at half positions, as in `maps.resize`.

    Raises:
        Unsupported: the maps have other axes than the input they are to lie on.
    """
    axes = maps.ndim - 2
    if axes not in _MODES or len(shape) != axes:
        raise Unsupported(
            Reason.LAYER_UNUSABLE,
            f"a layer with {axes} spatial axes cannot mask an input with {len(shape)}; choose a layer whose map has the input's "
            "axes, one to three of them",
            metadata={"layerAxes": axes, "inputAxes": len(shape)},
        )
    if tuple(maps.shape[2:]) == tuple(shape):
        return maps
    return torch.nn.functional.interpolate(maps, size=tuple(shape), mode=_MODES[axes], align_corners=aligns_corners)


def stretch(masks: Float[Tensor, "n 1 *space"]) -> Float[Tensor, "n 1 *space"]:
    """Maps each mask's range onto [0, 1], at any scale; a constant one becomes 0."""
    low, high, is_constant = ranges(masks)
    return torch.where(is_constant, 0, (masks - low) / torch.where(is_constant, 1, high - low))


def ranges(
    values: Float[Tensor, "n *cells"],
) -> tuple[Float[Tensor, "n *ones"], Float[Tensor, "n *ones"], Bool[Tensor, "n *ones"]]:
    """Each row's smallest and largest value, and whether they are one within rounding, as enlarging leaves it of a constant.

    A row with NaN is not constant, so that the NaN is carried on.
    """
    low, high = (extreme.reshape(-1, *[1] * (values.ndim - 1)) for extreme in values.flatten(1).aminmax(dim=1))
    rounding = _ROUNDING_STEPS * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    return low, high, high - low <= rounding


def window_starts(
    shape: Sequence[int], windows: Sequence[int], strides: Sequence[int], *, stays_inside: bool
) -> Int[Tensor, "n axes"]:
    """First cells of windows that together cover an input, in row-major order.

    The last window along an axis reaches past the edge, or is pushed back so that it ends there.
    """
    along = []
    for size, window, stride in zip(shape, windows, strides, strict=True):
        starts = torch.arange(math.ceil((size - window) / stride) + 1) * stride
        along.append(starts.clamp_max(size - window) if stays_inside else starts)
    return torch.cartesian_prod(*along).reshape(-1, len(along))


def window_masks(
    starts: Int[Tensor, "n axes"], windows: Sequence[int], shape: Sequence[int]
) -> Bool[Tensor, "n 1 *shape"]:
    """True inside each window, on the device of `starts`."""
    inside = torch.ones(len(starts), 1, *[1] * len(shape), dtype=torch.bool, device=starts.device)
    for axis, (size, window) in enumerate(zip(shape, windows, strict=True)):
        first = starts[:, axis, None]
        cells = torch.arange(size, device=starts.device)
        along = (cells >= first) & (cells < first + window)
        inside = inside & along.reshape(len(starts), 1, *[size if other == axis else 1 for other in range(len(shape))])
    return inside


def random_grids(
    generator: torch.Generator, count: int, shape: Sequence[int], *, cells: int, share: float
) -> tuple[Float[Tensor, "count 1 *cells"], Int[Tensor, "count axes"]]:
    """Coarse random grids and their shifts, on the CPU: each of `cells` per axis is kept, 1, with probability `share`."""
    grids = torch.rand(count, 1, *[cells] * len(shape), generator=generator) < share
    shifts = [torch.randint(math.ceil(size / cells), (count,), generator=generator) for size in shape]
    return grids.float(), torch.stack(shifts, dim=1)


def random_masks(
    grids: Float[Tensor, "n 1 *cells"], shifts: Int[Tensor, "n axes"], shape: Sequence[int]
) -> Float[Tensor, "n 1 *shape"]:
    """RISE's masks (arXiv:1806.07421): each grid is enlarged to one cell more than the input, then cut out at its shift."""
    cells = grids.shape[2:]
    larger = [(count + 1) * math.ceil(size / count) for count, size in zip(cells, shape, strict=True)]
    enlarged = enlarge(grids, larger)
    return torch.stack(
        [
            mask[(slice(None), *(slice(first, first + size) for first, size in zip(shift, shape, strict=True)))]
            for mask, shift in zip(enlarged, shifts.tolist(), strict=True)
        ]
    )


def blur(values: Float[Tensor, "n c *space"], *, kernel: int, sigma: float) -> Float[Tensor, "n c *space"]:
    """Gaussian blur along every axis, edges mirrored without repeating the outermost cell.

    Args:
        values: to blur.
        kernel: cells, odd; along axes too short to mirror that far, as many as can be.
        sigma: standard deviation, in cells.
    """
    for axis in range(2, values.ndim):
        reach = min(kernel // 2, values.shape[axis] - 1)
        offsets = torch.arange(-reach, reach + 1, device=values.device, dtype=torch.float64)
        weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0).to(values.dtype)
        turned = values.movedim(axis, -1)
        lines = torch.nn.functional.pad(turned.reshape(-1, 1, turned.shape[-1]), (reach, reach), mode="reflect")
        values = torch.nn.functional.conv1d(lines, weights[None, None]).reshape(turned.shape).movedim(-1, axis)
    return values

"""From raw maps to a finished one: rectify, bring several layers together, normalise, resize, and say what a reader must know.

A row's raw signed maps arrive, one for each layer, as `methods.py` left them; a finite float32 map leaves, with its raw range and
its flags. A map in input space still has its channels and is finished by `finish_channels`. `engine/mapping.py` calls both;
encoding calls `resize`. Everything here is a pure function of small tensors without a batch dimension, on any device; a map's
space has one to three axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.saliency import reduce_channels
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import Fusion, MapFlag, Normalisation, Profile, Saliency

__all__ = ["FinishedMap", "finish", "finish_channels", "fuse", "is_constant", "normalise", "rectify", "resize"]

# A range of fewer steps than this at the map's magnitude is what summing channels leaves of a constant in float32.
_ROUNDING_STEPS = 16
# LayerCAM's gamma (IEEE TIP 30, 2021), also torchcam's.
_LAYERCAM_GAMMA = 2.0
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FinishedMap:
    """A map that is ready to leave the engine.

    Attributes:
        values: (*space) float32, finite; (*space c) where channels are kept apart.
        raw_min: smallest value of the signed map, before rectification and normalisation. For several layers, whose raw scales
            cannot be compared, that of the fused map before normalisation.
        raw_max: likewise the largest.
        flags: what a reader must know; PARTIAL is never among them.
    """

    values: Float[Tensor, "*shape"]
    raw_min: float
    raw_max: float
    flags: frozenset[MapFlag]


def rectify(values: Float[Tensor, "*space"]) -> Float[Tensor, "*space"]:
    """Keeps positive evidence only."""
    return values.clamp_min(0)


def is_constant(values: Float[Tensor, "*space"]) -> bool:
    """Tells whether a finite map has one value everywhere, within float32 rounding at its own magnitude."""
    low, high = _range(values)
    return high - low <= _ROUNDING_STEPS * torch.finfo(torch.float32).eps * max(abs(low), abs(high))


def normalise(values: Float[Tensor, "*space"]) -> Float[Tensor, "*space"]:
    """Maps the range onto [0, 1], both ends reached, at any scale: there is no constant in the denominator to outweigh it.

    A constant map has no range: it becomes 1 where its value is positive and 0 elsewhere, never the noise of its last digits.
    """
    low, high = _range(values)
    if is_constant(values):
        return torch.full_like(values, 1.0 if high > 0 else 0.0)
    # In float64 because the range of a float32 map may overflow, and that of a tiny one be subnormal.
    return ((values.double() - low) / (high - low)).to(values.dtype)


def resize(values: Float[Tensor, "*space"], shape: Sequence[int]) -> Float[Tensor, "*new_space"]:
    """Interpolates linearly along each axis, cell centres at half positions, edges repeated, no antialiasing.

    This is `align_corners=False`, and OpenCV's bilinear resize. Enlarged maps usually miss the cell centres, so their maximum may
    fall below that of the original.

    Raises:
        ValueError: the map has not one to three axes, or `shape` another number of them.
    """
    if values.ndim not in _INTERPOLATION or len(shape) != values.ndim:
        raise ValueError(f"a map of shape {tuple(values.shape)} cannot be resized to {tuple(shape)}")
    if tuple(values.shape) == tuple(shape):
        return values
    mode = _INTERPOLATION[values.ndim]
    return torch.nn.functional.interpolate(values[None, None], size=tuple(shape), mode=mode, align_corners=False)[0, 0]


def fuse(
    maps: Sequence[Float[Tensor, "*space"]], fusion: Fusion, *, is_rectified: bool, profile: Profile = Profile.PAPER
) -> Float[Tensor, "*space"]:
    """Makes one map of several layers' finite maps, at the resolution of the finest.

    Each map is first resized to the finest, then brought to a common scale: enlarging first lets every layer reach its peak, as
    LayerCAM's official code does. Rectified maps are min-max normalised, signed ones divided by their largest magnitude so that
    zero stays "no evidence". Then:

    - MEAN, the default of pytorch-grad-cam; MAX, cell by cell.
    - PRODUCT, as RefineCAM (arXiv:2605.14641): what all layers agree on. Of rectified maps only. Both libraries normalise before
      they enlarge, and so do their profiles.
    - LAYERCAM (IEEE TIP 30, 2021): the maximum, after layers finer than the coarsest were scaled by tanh(2 M / max M), because
      shallow layers respond weakly. The torchcam profile scales every layer, min-max normalised, before it enlarges.

    A single map is returned as it is.

    Raises:
        InvalidRequest: a product or LayerCAM fusion of signed maps: two negatives would make a positive, and tanh scaling is
            defined on positive evidence.
    """
    if len(maps) == 1:
        return maps[0]
    if not is_rectified and fusion in (Fusion.PRODUCT, Fusion.LAYERCAM):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"fusion {fusion.value!r} needs rectified maps: set rectify, or fuse by mean or max",
            metadata={"fusion": fusion.value},
        )
    shapes = [tuple(values.shape) for values in maps]
    finest, coarsest = max(shapes, key=math.prod), min(math.prod(shape) for shape in shapes)
    if fusion is Fusion.PRODUCT and profile is not Profile.PAPER:
        return torch.stack([resize(normalise(values), finest) for values in maps]).prod(dim=0)
    if fusion is Fusion.LAYERCAM and profile is Profile.TORCHCAM:
        lifted = [(_LAYERCAM_GAMMA * normalise(values)).tanh() for values in maps]
        return torch.stack([resize(values, finest) for values in lifted]).amax(dim=0)
    resized = [resize(values, finest) for values in maps]
    if fusion is Fusion.LAYERCAM:
        layers = torch.stack(
            [
                (_LAYERCAM_GAMMA * _over_peak(values)).tanh() if math.prod(shape) > coarsest else _over_peak(values)
                for values, shape in zip(resized, shapes, strict=True)
            ]
        )
        return layers.amax(dim=0)
    layers = torch.stack([normalise(values) if is_rectified else _over_peak(values) for values in resized])
    if fusion is Fusion.PRODUCT:
        return layers.prod(dim=0)
    return layers.amax(dim=0) if fusion is Fusion.MAX else layers.mean(dim=0)


def finish(
    maps: Sequence[Float[Tensor, "*space"]],
    *,
    is_rectified: bool,
    normalisation: Normalisation = Normalisation.NONE,
    fusion: Fusion = Fusion.MEAN,
    profile: Profile = Profile.PAPER,
) -> FinishedMap:
    """Makes the map that is sent from the raw signed maps of one row, one for each layer.

    Flags: NON_FINITE where NaN or infinity appeared in any layer (zero takes its place); NEGATIVE_ONLY where there is negative
    evidence and none that is positive, in every layer, before rectification; EMPTY where the result is zero everywhere; CONSTANT
    where it has one other value everywhere.

    Args:
        maps: at least one, on one device.
        is_rectified: drop negative values.
        normalisation: applied last.
        fusion: how several become one; see `fuse`.
        profile: whose fusion to follow.

    Raises:
        InvalidRequest: as `fuse`.
    """
    # Judged as float32, which is what leaves: a float64 value beyond its range would become infinite at the end.
    is_finite = [values.float().isfinite() for values in maps]
    finite = [torch.where(mask, values, 0) for values, mask in zip(maps, is_finite, strict=True)]
    flags = set()
    if not all(bool(mask.all()) for mask in is_finite):
        flags.add(MapFlag.NON_FINITE)
    ranges = [_range(values) for values in finite]
    if all(high <= 0 for _, high in ranges) and any(low < 0 for low, _ in ranges):
        flags.add(MapFlag.NEGATIVE_ONLY)
    values = fuse(
        [rectify(values) for values in finite] if is_rectified else finite,
        fusion,
        is_rectified=is_rectified,
        profile=profile,
    )
    raw_min, raw_max = ranges[0] if len(maps) == 1 else _range(values)
    if not bool(values.any()):
        flags.add(MapFlag.EMPTY)
    elif is_constant(values):
        flags.add(MapFlag.CONSTANT)
    if normalisation is Normalisation.MIN_MAX:
        values = normalise(values)
    return FinishedMap(values=values.float(), raw_min=raw_min, raw_max=raw_max, flags=frozenset(flags))


def finish_channels(
    values: Float[Tensor, "c *space"],
    saliency: Saliency,
    *,
    is_rectified: bool = False,
    normalisation: Normalisation = Normalisation.NONE,
) -> FinishedMap:
    """Makes the map that is sent from the raw signed map of one row in input space.

    Flags: NON_FINITE where NaN or infinity appeared (zero takes its place); EMPTY where the result is zero everywhere, CONSTANT
    where it has one other value everywhere, over all channels that are sent.

    Args:
        values: the map with the input's channels.
        saliency: how they are brought together; see `saliency.reduce_channels`.
        is_rectified: drop negative values before that.
        normalisation: applied last, over all channels at once, so that colours keep their balance.
    """
    is_finite = values.float().isfinite()
    flags = set() if bool(is_finite.all()) else {MapFlag.NON_FINITE}
    finite = torch.where(is_finite, values, 0)
    raw_min, raw_max = _range(reduce_channels(finite, saliency))
    reduced = reduce_channels(rectify(finite) if is_rectified else finite, saliency)
    if not bool(reduced.any()):
        flags.add(MapFlag.EMPTY)
    elif is_constant(reduced):
        flags.add(MapFlag.CONSTANT)
    if normalisation is Normalisation.MIN_MAX:
        reduced = normalise(reduced)
    return FinishedMap(values=reduced.float(), raw_min=raw_min, raw_max=raw_max, flags=frozenset(flags))


def _range(values: Float[Tensor, "*space"]) -> tuple[float, float]:
    low, high = values.aminmax()
    return float(low), float(high)


def _over_peak(values: Float[Tensor, "*space"]) -> Float[Tensor, "*space"]:
    """Divides by the largest magnitude; zero everywhere stays so."""
    peak = float(values.abs().amax())
    return (values.double() / peak).to(values.dtype) if peak > 0 else values

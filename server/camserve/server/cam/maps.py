"""From raw maps to a finished one: rectify, bring several layers together, normalise, resize, and say what a reader must know.

A row's raw signed maps arrive on the host, one for each layer; a finite float32 map leaves, with its raw range and its flags. A
map in input space still has its channels and is finished by `finish_channels`. `engine/mapping.py` calls both. Everything here is
a pure function of arrays without a batch dimension, float32 or float64: numpy takes a third of torch's time for a few dozen
cells. A map's space has one to three axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float

from camserve.server.cam.saliency import reduce_channels
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import FloatArray, Fusion, MapFlag, Normalisation, Profile, Saliency

__all__ = ["Array", "FinishedMap", "finish", "finish_channels", "fuse", "is_constant", "normalise", "rectify", "resize"]

Array: TypeAlias = npt.NDArray[np.floating]

_LARGEST = float(np.finfo(np.float32).max)
# A range of fewer steps than 16 at the map's magnitude is what summing channels leaves of a constant in float32.
_ROUNDING = 16 * float(np.finfo(np.float32).eps)
# LayerCAM's gamma (IEEE TIP 30, 2021), also torchcam's.
_LAYERCAM_GAMMA = 2.0
_TOGETHER: Final[Mapping[Fusion, Callable[..., Any]]] = {
    Fusion.MEAN: np.mean,
    Fusion.MAX: np.max,
    Fusion.PRODUCT: np.prod,
    Fusion.LAYERCAM: np.max,
}
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

    values: FloatArray
    raw_min: float
    raw_max: float
    flags: frozenset[MapFlag]


def rectify(values: Float[Array, "*space"]) -> Float[Array, "*space"]:
    """Keeps positive evidence only."""
    return np.maximum(values, 0)


def is_constant(values: Float[Array, "*space"]) -> bool:
    """Tells whether a finite map has one value everywhere, within float32 rounding at its own magnitude."""
    return _is_flat(*_range(values))


def normalise(values: Float[Array, "*space"]) -> Float[Array, "*space"]:
    """Maps the range onto [0, 1], both ends reached, at any scale: there is no constant in the denominator to outweigh it.

    A constant map has no range: it becomes 1 where its value is positive and 0 elsewhere, never the noise of its last digits.
    """
    low, high = _range(values)
    if _is_flat(low, high):
        return np.full_like(values, 1.0 if high > 0 else 0.0)
    # In float64 because the range of a float32 map may overflow, and that of a tiny one be subnormal.
    return ((values.astype(np.float64) - low) / (high - low)).astype(values.dtype)


def resize(values: Float[Array, "*space"], shape: Sequence[int]) -> Float[Array, "*new_space"]:
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
    given = torch.from_numpy(values)[None, None]
    return torch.nn.functional.interpolate(given, size=tuple(shape), mode=mode, align_corners=False)[0, 0].numpy()


def fuse(
    maps: Sequence[Float[Array, "*space"]], fusion: Fusion, *, is_rectified: bool, profile: Profile = Profile.PAPER
) -> Float[Array, "*space"]:
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
    together: Array = _TOGETHER[fusion](np.stack(_comparable(maps, fusion, profile, is_rectified=is_rectified)), axis=0)
    return together


def finish(
    maps: Sequence[Float[Array, "*space"]],
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
        maps: at least one.
        is_rectified: drop negative values.
        normalisation: applied last.
        fusion: how several become one; see `fuse`.
        profile: whose fusion to follow.

    Raises:
        InvalidRequest: as `fuse`.
    """
    is_finite = [_fits(values) for values in maps]
    finite = [np.where(mask, values, 0) for values, mask in zip(maps, is_finite, strict=True)]
    flags = set() if all(mask.all() for mask in is_finite) else {MapFlag.NON_FINITE}
    ranges = [_range(values) for values in finite]
    if all(high <= 0 for _, high in ranges) and any(low < 0 for low, _ in ranges):
        flags.add(MapFlag.NEGATIVE_ONLY)
    if is_rectified:
        finite = [rectify(values) for values in finite]
    values = fuse(finite, fusion, is_rectified=is_rectified, profile=profile)
    raw_min, raw_max = ranges[0] if len(maps) == 1 else _range(values)
    return _finished(values, raw_min, raw_max, flags, normalisation)


def finish_channels(
    values: Float[Array, "c *space"],
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
    is_finite = _fits(values)
    finite = torch.from_numpy(np.where(is_finite, values, 0))
    flags = set() if is_finite.all() else {MapFlag.NON_FINITE}
    raw_min, raw_max = _range(reduce_channels(finite, saliency).numpy())
    reduced = reduce_channels(finite.clamp_min(0) if is_rectified else finite, saliency).numpy()
    return _finished(reduced, raw_min, raw_max, flags, normalisation)


def _comparable(
    maps: Sequence[Float[Array, "*space"]], fusion: Fusion, profile: Profile, *, is_rectified: bool
) -> list[Float[Array, "*space"]]:
    """The layers' maps at the resolution of the finest and on a common scale; see `fuse`."""
    shapes = [values.shape for values in maps]
    finest, coarsest = max(shapes, key=math.prod), min(math.prod(shape) for shape in shapes)
    if fusion is Fusion.PRODUCT and profile is not Profile.PAPER:
        return [resize(normalise(values), finest) for values in maps]
    if fusion is Fusion.LAYERCAM and profile is Profile.TORCHCAM:
        return [resize(_lifted(normalise(values)), finest) for values in maps]
    resized = [resize(values, finest) for values in maps]
    if fusion is Fusion.LAYERCAM:
        return [
            _lifted(_over_peak(values)) if math.prod(shape) > coarsest else _over_peak(values)
            for values, shape in zip(resized, shapes, strict=True)
        ]
    return [normalise(values) if is_rectified else _over_peak(values) for values in resized]


def _lifted(values: Float[Array, "*space"]) -> Float[Array, "*space"]:
    """What responds weakly comes closer to what responds strongly."""
    lifted: Array = np.tanh(_LAYERCAM_GAMMA * values)
    return lifted


def _fits(values: Float[Array, "*shape"]) -> npt.NDArray[np.bool_]:
    """Which are finite as float32, which is what leaves: a larger float64 value would become infinite at the end."""
    fits: npt.NDArray[np.bool_] = np.abs(values) <= _LARGEST
    return fits


def _finished(
    values: Float[Array, "*shape"], raw_min: float, raw_max: float, flags: set[MapFlag], normalisation: Normalisation
) -> FinishedMap:
    """Flags what shows in the values that are sent, and normalises them."""
    low, high = _range(values)
    if low == high == 0:
        flags.add(MapFlag.EMPTY)
    elif _is_flat(low, high):
        flags.add(MapFlag.CONSTANT)
    if normalisation is Normalisation.MIN_MAX:
        values = normalise(values)
    sent = values.astype(np.float32, copy=False)
    return FinishedMap(values=sent, raw_min=raw_min, raw_max=raw_max, flags=frozenset(flags))


def _range(values: Float[Array, "*space"]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _is_flat(low: float, high: float) -> bool:
    return high - low <= _ROUNDING * max(abs(low), abs(high))


def _over_peak(values: Float[Array, "*space"]) -> Float[Array, "*space"]:
    """Divides by the largest magnitude; zero everywhere stays so."""
    peak = float(np.abs(values).max())
    return (values.astype(np.float64) / peak).astype(values.dtype) if peak > 0 else values

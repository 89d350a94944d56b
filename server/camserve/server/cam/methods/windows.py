"""Methods that cover, keep or magnify parts of the input, whatever the layers say: occlusion, RISE and SESS.

Each is a generator of steps over one row, called by `engine/` through the table in `perturbation.py`. Their maps have the input's
resolution.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.budget import at_least_one, chunks, spread
from camserve.server.cam.methods.masks import (
    blur,
    enlarge,
    random_grids,
    random_masks,
    stretch,
    window_masks,
    window_starts,
)
from camserve.server.cam.methods.method import Amplified, Scene, Step
from camserve.server.cam.methods.numerics import given, sum_space, widen
from camserve.server.errors import InvalidRequest, Reason

__all__ = ["OCCLUSION", "RISE", "SESS"]

# An occluding patch is an eighth of the shorter side, and moves by half of itself.
_PATCHES_PER_SIDE = 8
# RISE's official code has 8 cells a side; the paper's probability is one half.
_RISE_MASKS = 1000
_RISE_CELLS = 8
_RISE_SHARE = 0.5
# SESS, arXiv:2207.01769: 224, 288 ... 928 for an input of 224; smoothed as in the official code.
_SCALES = 12
_SCALE_STEP = 2 / 7
# What interpolating between 0 and 1 leaves of 0 in float32 where a sample falls on a cell.
_NOTHING = 1e-6
_SMOOTHING_KERNEL = 11
_SMOOTHING_SIGMA = 5.0

_Placed: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], Tensor]


def _occlusion(scene: Scene) -> Iterator[Step]:
    """Occlusion (Zeiler and Fergus, arXiv:1311.2901): y(x) - y(x with a patch covered), averaged where patches overlap.

    The patch is `window` cells a side, all channels, covered with 0, which is the mean colour of a normalised image; it moves by
    `stride`. Unset, they are an eighth of the input's shorter side and half of that. Windows longer than an axis cover it whole,
    and those at the far edge are cut off there, as in captum. Patches are tried in a scattered order, so that a partial map is
    coarse rather than cut off; cells that none has covered yet are 0. NaN scores make the map NaN.

    Raises:
        InvalidRequest: window or stride below 1, or a stride beyond the window, which would leave cells that are never covered.
    """
    inputs = scene.inputs
    shape = tuple(inputs.shape[2:])
    window, stride = _window(scene, shape)
    windows = [min(window, size) for size in shape]
    starts = window_starts(shape, windows, [stride] * len(shape), stays_inside=False)
    starts = starts[spread(len(starts))].to(inputs.device)
    score = scene.score
    heat = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
    covers = torch.zeros_like(heat)
    for chunk in chunks(len(starts), scene.chunk_rows):
        inside = window_masks(starts[chunk], windows, shape)
        drops = score - scene.scores(torch.where(inside, torch.zeros_like(inputs[:1]), inputs)).double()
        patches = inside[:, 0].double()
        heat = heat + torch.tensordot(drops, patches, dims=1)
        covers = covers + patches.sum(dim=0)
        yield Step(done=chunk.stop, total=len(starts), best=functools.partial(_mean_cover, heat, covers))


def _window(scene: Scene, shape: Sequence[int]) -> tuple[int, int]:
    parameters = scene.parameters
    usual = max(1, round(min(shape) / _PATCHES_PER_SIDE))
    window = at_least_one(parameters.window, usual, name="window", method="occlusion")
    stride = at_least_one(parameters.stride, max(1, window // 2), name="stride", method="occlusion")
    return window, _within(stride, window, "occlusion")


def _within(stride: int, window: int, method: str) -> int:
    if stride > window:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{method} was asked to move a window of {window} cells by {stride}, which leaves cells out; the stride is at most "
            f"{window}",
            metadata={"method": method, "parameter": "stride", "value": stride, "window": window},
        )
    return stride


def _mean_cover(heat: Float[Tensor, "*input"], covers: Float[Tensor, "*input"]) -> Float[Tensor, "*input"]:
    return (heat / covers.clamp_min(1)).float()


def _rise(scene: Scene) -> Iterator[Step]:
    """RISE (Petsiuk et al., arXiv:1806.07421): 1 / (n p) sum_i y(x * M_i) M_i, over n random masks.

    A mask is a grid of 8 cells a side, each kept with probability p = 1/2, enlarged and shifted at random; n is `samples` (1000,
    where the paper takes 4000 to 8000), the numbers come from `seed`. The score is the target's; the paper takes the softmax. A
    partial map is the same over fewer masks. NaN scores make the map NaN.
    """
    inputs = scene.inputs
    shape = tuple(inputs.shape[2:])
    samples = at_least_one(scene.parameters.samples, _RISE_MASKS, name="samples", method="rise")
    grids, shifts = random_grids(scene.generator(), samples, shape, cells=_RISE_CELLS, share=_RISE_SHARE)
    heat = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
    for chunk in chunks(samples, scene.chunk_rows):
        masks = random_masks(grids[chunk].to(inputs.device), shifts[chunk], shape)
        scores = scene.scores(inputs * masks.to(inputs.dtype)).double()
        heat = heat + torch.tensordot(scores, masks[:, 0].double(), dims=1)
        yield Step(done=chunk.stop, total=samples, best=functools.partial(_expectation, heat, chunk.stop))


def _expectation(heat: Float[Tensor, "*input"], samples: int) -> Float[Tensor, "*input"]:
    return (heat / (samples * _RISE_SHARE)).float()


def _sess(scene: Scene) -> Iterator[Step]:
    """SESS (Tursun et al., arXiv:2207.01769): Grad-CAMs of magnified parts, put back in place, weighed by their parts' scores.

    The input is enlarged to 12 scales, 1, 1 + 2/7, 1 + 4/7 ...; a window of the input's own size slides over each by `stride`
    cells, the window itself unless set. Each part's Grad-CAM is rectified, min-max normalised at the input's resolution,
    multiplied by the part's score, negative ones counting as 0, over the largest, and shrunk back. A cell's value is the mean
    of those above 0, at last blurred over 11 cells. The score is the target's, where the paper takes the softmax; if no part's
    is above 0, nothing is weighed. A Grad-CAM of zeros stays so. The first part is the whole input.

    Raises:
        InvalidRequest: a stride below 1 or beyond the window.
    """
    shape = tuple(scene.inputs.shape[2:])
    stride = scene.parameters.stride
    strides = [_within(at_least_one(stride, size, name="stride", method="sess"), size, "sess") for size in shape]
    total = sum(len(window_starts(scaled, shape, strides, stays_inside=True)) for scaled in _scales(shape))
    parts = _parts(scene.inputs, strides)
    zeros = torch.zeros(shape, dtype=torch.float64, device=scene.inputs.device)
    weighed, plain, peak = _Mean(zeros, zeros), _Mean(zeros, zeros), zeros.amax()
    done = 0
    while placed := list(itertools.islice(parts, scene.chunk_rows)):
        batch = torch.cat([part for _, _, part in placed])
        scores = scene.scores(batch).double().clamp_min(0)
        maps = _grad_cams(scene, batch)
        for (scaled, start, _), score, part_map in zip(placed, scores, maps, strict=True):
            whole = _put_back(part_map, scaled, start).double()
            weighed, plain = weighed.plus(whole, score), plain.plus(whole, torch.ones_like(score))
        peak = torch.maximum(peak, scores.amax())
        done += len(placed)
        yield Step(done=done, total=total, best=functools.partial(_fused, weighed, plain, peak))


class _Mean:
    """A running weighted sum of maps, over the parts that have evidence at a cell; NaN is evidence, so that it shows."""

    __slots__ = ("counts", "totals")

    def __init__(self, totals: Float[Tensor, "*input"], counts: Float[Tensor, "*input"]) -> None:
        self.totals = totals
        self.counts = counts

    def plus(self, part: Float[Tensor, "*input"], weight: Float[Tensor, ""]) -> _Mean:
        counted = ~(part <= _NOTHING) & ~(weight <= 0)
        return _Mean(self.totals + torch.where(counted, part * weight, 0), self.counts + counted)

    def value(self) -> Float[Tensor, "*input"]:
        return self.totals / self.counts.clamp_min(1)


def _fused(weighed: _Mean, plain: _Mean, peak: Tensor) -> Float[Tensor, "*input"]:
    fused = torch.where(peak == 0, plain.value(), weighed.value() / torch.where(peak == 0, 1, peak))
    return blur(fused[None, None], kernel=_SMOOTHING_KERNEL, sigma=_SMOOTHING_SIGMA)[0, 0].float()


def _scales(shape: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(size + number * round(size * _SCALE_STEP) for size in shape) for number in range(_SCALES)]


def _parts(inputs: Float[Tensor, "1 c *input"], strides: Sequence[int]) -> Iterator[_Placed]:
    """Each part with the scale's shape and its own first cell there."""
    shape = inputs.shape[2:]
    for scaled in _scales(shape):
        enlarged = enlarge(inputs, scaled)
        for start in window_starts(scaled, shape, strides, stays_inside=True).tolist():
            place = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
            yield scaled, tuple(start), enlarged[(slice(None), slice(None), *place)]


def _grad_cams(scene: Scene, inputs: Float[Tensor, "n c *input"]) -> Float[Tensor, "n *input"]:
    evidence = scene.evidence(inputs)
    activation, gradient = widen(evidence.activation), given(evidence.gradient, "gradient")
    weights = sum_space(gradient) / activation[0, 0].numel()
    maps = (weights * activation).sum(dim=1, keepdim=True).clamp_min(0)
    return stretch(enlarge(maps, inputs.shape[2:]))[:, 0]


def _put_back(
    part_map: Float[Tensor, "*input"], scaled: Sequence[int], start: Sequence[int]
) -> Float[Tensor, "*input"]:
    canvas = part_map.new_zeros(tuple(scaled))
    canvas[tuple(slice(first, first + size) for first, size in zip(start, part_map.shape, strict=True))] = part_map
    return enlarge(canvas[None, None], part_map.shape)[0, 0]


OCCLUSION = Amplified(_occlusion)
RISE = Amplified(_rise)
SESS = Amplified(_sess)

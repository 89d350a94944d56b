"""Methods that show the model only what a channel marks, and weigh the channel by the score that is left: Score-CAM and its kin.

Each is a generator of steps over one row, called by `engine/` through the table in `perturbation.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camserve.server.cam.methods.budget import at_least_one, choose_channels, chunks, draw_noise, noise_share
from camserve.server.cam.methods.masks import blur, enlarge, ranges, stretch
from camserve.server.cam.methods.method import Amplified, Scene, Step
from camserve.server.cam.methods.numerics import widen

__all__ = [
    "GROUP_CAM",
    "IS_CAM",
    "IS_CAM_TORCHCAM",
    "SCORE_CAM",
    "SCORE_CAM_PYTORCH_GRAD_CAM",
    "SCORE_CAM_TORCHCAM",
    "SS_CAM",
    "SS_CAM_TORCHCAM",
]

# The defaults of SS-CAM and IS-CAM in torchcam 0.5, after the papers.
_NOISY_MASKS = 35
_MASK_NOISE = 2.0
_INTEGRAL_STEPS = 10
# Group-CAM's official code.
_GROUPS = 32
_KEPT_ABOVE = 0.7
_BLUR_KERNEL = 51
_BLUR_SIGMA = 50.0

_Rounds: TypeAlias = Sequence[Callable[[Tensor], Tensor]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Convention:
    """How channels become masks.

    Attributes:
        make_masks: (n 1 *space) activations and the input's shape to (n 1 *input) masks.
        skips_constant: leave out channels that have one value everywhere: they mark nothing, and have no range to normalise by.
    """

    make_masks: Callable[[Tensor, Sequence[int]], Tensor]
    skips_constant: bool = False


def _paper_masks(activations: Tensor, shape: Sequence[int]) -> Tensor:
    return stretch(enlarge(activations, shape))


def _pytorch_grad_cam_masks(activations: Tensor, shape: Sequence[int]) -> Tensor:
    """As `UpsamplingBilinear2d` enlarges: corners on corners; 1e-8 in the denominator."""
    masks = enlarge(activations, shape, aligns_corners=True)
    low, high = (extreme.reshape(-1, *[1] * (masks.ndim - 1)) for extreme in masks.flatten(1).aminmax(dim=1))
    return (masks - low) / (high - low + 1e-8)


def _torchcam_masks(activations: Tensor, shape: Sequence[int]) -> Tensor:
    """Normalised before enlarging, so that masks need not reach 1; along one axis the nearest cell is taken."""
    low = activations.flatten(1).amin(dim=1).reshape(-1, *[1] * (activations.ndim - 1))
    raised = activations - low
    masks = raised / (raised.flatten(1).amax(dim=1).reshape(low.shape) + 1e-8)
    if len(shape) == 1:
        return torch.nn.functional.interpolate(masks, size=tuple(shape))
    return enlarge(masks, shape)


_PAPER = _Convention(make_masks=_paper_masks, skips_constant=True)
_PYTORCH_GRAD_CAM = _Convention(make_masks=_pytorch_grad_cam_masks)
_TORCHCAM = _Convention(make_masks=_torchcam_masks)


def _unchanged(masks: Tensor) -> Tensor:
    return masks


def _weigh_by_score(scene: Scene, convention: _Convention, rounds: _Rounds, *, method: str) -> Iterator[Step]:
    """Yields the map sum_k softmax_k(mean over rounds of y(x * change(M_k))) A_k.

    Rounds are the outer loop: once every channel was tried, each further round makes the whole map better. Channels that were not
    tried yet, were skipped, or are over the budget, have no weight.
    """
    activation = widen(scene.activation)
    is_constant = ranges(activation[0].flatten(1))[2].squeeze(1)
    marks = ~is_constant if convention.skips_constant else torch.ones_like(is_constant)
    channels = choose_channels(scene, marks, method=method)
    if not len(channels):
        yield Step(done=1, total=1, best=functools.partial(torch.zeros_like, activation[0, 0]))
        return
    shape = scene.inputs.shape[2:]
    totals = torch.zeros(len(channels), dtype=torch.float64, device=activation.device)
    for number, change in enumerate(rounds):
        for chunk in chunks(len(channels), scene.chunk_rows):
            masks = change(convention.make_masks(activation[0, channels[chunk], None], shape))
            totals = totals.clone()
            totals[chunk] += scene.scores(scene.inputs * masks.to(scene.inputs.dtype)).double()
            yield Step(
                done=number * len(channels) + chunk.stop,
                total=len(rounds) * len(channels),
                best=functools.partial(_weighted_sum, activation, channels, totals, number, chunk.stop),
            )


def _weighted_sum(
    activation: Float[Tensor, "1 c *space"],
    channels: Int[Tensor, "chosen"],
    totals: Float[Tensor, "chosen"],
    rounds: int,
    stop: int,
) -> Float[Tensor, "*space"]:
    """The map after whole rounds and the first channels, up to `stop`, of one more."""
    tried = stop if rounds == 0 else len(channels)
    tries = rounds + (torch.arange(tried, device=totals.device) < stop).double()
    weights = torch.softmax(totals[:tried] / tries, dim=0).to(activation.dtype)
    total: Tensor = torch.tensordot(weights, activation[0, channels[:tried]], dims=1)
    return total


def _score_cam(convention: _Convention) -> Amplified:
    """Score-CAM (arXiv:1910.01279, algorithm 1): sum_k softmax_k(y(x * M_k) - y(baseline)) A_k.

    M_k is channel k enlarged to the input and min-max normalised; the baseline's score is the same for all channels and cancels
    in the softmax. Channels of one value everywhere have no M_k and no weight, as in the official code; if there are no others,
    as in a layer of one cell, the map is 0. NaN scores make the map NaN. Reads `channels`.
    """
    return Amplified(lambda scene: _weigh_by_score(scene, convention, [_unchanged], method="score-cam"))


def _ss_cam(convention: _Convention) -> Amplified:
    """SS-CAM (arXiv:2006.14255): Score-CAM with the mean score over n noisy masks, softmax_k(1/n sum_i y(x * (M_k + noise_i))).

    The noise is normal, of standard deviation `noise` in units of the mask's range (2), over `samples` copies (35), from `seed`.
    """

    def steps(scene: Scene) -> Iterator[Step]:
        parameters = scene.parameters
        samples = at_least_one(parameters.samples, _NOISY_MASKS, name="samples", method="ss-cam")
        noise = noise_share(parameters.noise, _MASK_NOISE, method="ss-cam")
        generator = scene.generator()

        def roughen(masks: Tensor) -> Tensor:
            return masks + noise * draw_noise(generator, len(masks), masks.shape[1:]).to(masks)

        return _weigh_by_score(scene, convention, [roughen] * samples, method="ss-cam")

    return Amplified(steps)


def _is_cam(convention: _Convention, coefficient: Callable[[int, int], float]) -> Amplified:
    """IS-CAM (arXiv:2010.03023): Score-CAM with the score integrated along the mask, softmax_k(1/n sum_i y(x * i/n * M_k)).

    i runs from 1 to n, `steps` (10). The integral is the plain Riemann sum from the black input to the masked one.
    """

    def steps(scene: Scene) -> Iterator[Step]:
        count = at_least_one(scene.parameters.steps, _INTEGRAL_STEPS, name="steps", method="is-cam")
        rounds = [functools.partial(_times, coefficient(step, count)) for step in range(1, count + 1)]
        return _weigh_by_score(scene, convention, rounds, method="is-cam")

    return Amplified(steps)


def _times(factor: float, masks: Tensor) -> Tensor:
    return factor * masks


def _summed_coefficient(step: int, count: int) -> float:
    """What torchcam 0.5 multiplies by: its coefficients add up, 0.1, 0.3, 0.6 ... 5.5, and leave the interval."""
    return step * (step + 1) / (2 * count)


def _group_cam(scene: Scene) -> Iterator[Step]:
    """Group-CAM (arXiv:2103.13859): sum_l (y(x * M_l + blurred x * (1 - M_l)) - y(blurred x)) M_l.

    The channels, in their order, make 32 groups; M_l = ReLU(sum over the group of mean(g_k) A_k), with cells up to its 70th
    percentile set to 0, enlarged to the input and min-max normalised. Groups whose mask has one value everywhere are left out.
    Blur is Gaussian, 51 cells, sigma 50, as in the official code, fewer along short axes. The score is the target's; the paper
    takes the softmax. The map is at the layer's resolution: enlarging it gives the paper's, since both sides are linear.
    """
    activation, gradient = widen(scene.activation), widen(scene.gradient())
    weighted = gradient.flatten(2).mean(dim=2).reshape(gradient.shape[:2] + (1,) * (gradient.ndim - 2)) * activation
    groups = torch.cat([part.sum(dim=1) for part in weighted.chunk(_GROUPS, dim=1)]).clamp_min(0)[:, None]
    groups = torch.where(groups <= _quantile(groups), 0, groups)
    large = enlarge(groups, scene.inputs.shape[2:])
    low, high, is_constant = ranges(large)
    kept = ~is_constant.flatten()
    if not bool(kept.any()):
        yield Step(done=1, total=1, best=functools.partial(torch.zeros_like, groups[0, 0]))
        return
    span = torch.where(is_constant, 1, high - low)
    masks, small = ((large - low) / span)[kept].to(scene.inputs.dtype), ((groups - low) / span)[kept, 0]
    blurred = blur(scene.inputs, kernel=_BLUR_KERNEL, sigma=_BLUR_SIGMA)
    baseline = scene.scores(blurred).double()
    heat = torch.zeros_like(small[0])
    for chunk in chunks(len(masks), scene.chunk_rows):
        mixed = scene.inputs * masks[chunk] + blurred * (1 - masks[chunk])
        gains = (scene.scores(mixed).double() - baseline).to(heat.dtype)
        heat = heat + torch.tensordot(gains, small[chunk], dims=1)
        yield Step(done=chunk.stop, total=len(masks), best=heat.clone)


def _quantile(groups: Float[Tensor, "n 1 *space"]) -> Float[Tensor, "n 1 *ones"]:
    """Each group's 70th percentile, linearly between cells; by sorting, since `torch.quantile` refuses large layers."""
    ordered = groups.flatten(1).sort(dim=1).values
    place = _KEPT_ABOVE * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    values = torch.lerp(ordered[:, below], ordered[:, above], place - below)
    return values.reshape(-1, *[1] * (groups.ndim - 1))


SCORE_CAM = _score_cam(_PAPER)
SCORE_CAM_PYTORCH_GRAD_CAM = _score_cam(_PYTORCH_GRAD_CAM)
SCORE_CAM_TORCHCAM = _score_cam(_TORCHCAM)
SS_CAM = _ss_cam(_PAPER)
SS_CAM_TORCHCAM = _ss_cam(_TORCHCAM)
IS_CAM = _is_cam(_PAPER, lambda step, count: step / count)
IS_CAM_TORCHCAM = _is_cam(_TORCHCAM, _summed_coefficient)
GROUP_CAM = Amplified(_group_cam)

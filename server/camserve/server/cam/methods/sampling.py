"""Methods that gather gradients at many versions of the input: SmoothGrad, integrated gradients, Smooth Grad-CAM++.

Each is a generator of steps over one row. Called by `engine/` through the table below.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.budget import at_least_one, chunks, draw_noise, noise_share, spread
from camserve.server.cam.methods.method import Amplified, Evidence, Family, Method, Need, Reads, Scene, Step, WorkClass
from camserve.server.cam.methods.numerics import given, sum_space, widen
from camserve.server.jobs import Profile

__all__ = ["SAMPLING"]

_SAMPLES = 25
_NOISE = 0.15
_INTEGRAL_STEPS = 50
# torchcam 0.5's defaults for Smooth Grad-CAM++; its noise is in units of the model's input.
_TORCHCAM_SAMPLES = 4
_TORCHCAM_NOISE = 0.3


def _noisy_evidence(scene: Scene, samples: int, deviation: float | Tensor) -> Iterator[tuple[int, Evidence]]:
    """Evidence at noisy copies of the row, a chunk at a time, with how many copies there were so far."""
    generator, inputs = scene.generator(), scene.inputs
    for chunk in chunks(samples, scene.chunk_rows):
        noise = draw_noise(generator, chunk.stop - chunk.start, inputs.shape[1:])
        yield chunk.stop, scene.evidence(inputs + (deviation * noise.to(inputs.device)).to(inputs.dtype))


def _share_of_range(scene: Scene, method: str) -> Tensor:
    return (
        noise_share(scene.parameters.noise, _NOISE, method=method) * (scene.inputs.amax() - scene.inputs.amin()).float()
    )


def _smoothgrad(scene: Scene) -> Iterator[Step]:
    """SmoothGrad (Smilkov et al., arXiv:1706.03825): 1/n sum_i dy/dx at x + noise_i, with the input's channels, signed.

    The noise is normal, of standard deviation `noise` (0.15; the paper advises 0.1 to 0.2) times the input's range, over
    `samples` copies (25), from `seed`. A partial map is the mean of fewer.
    """
    samples = at_least_one(scene.parameters.samples, _SAMPLES, name="samples", method="smoothgrad")
    total = torch.zeros_like(scene.inputs[0], dtype=torch.float64)
    for done, evidence in _noisy_evidence(scene, samples, _share_of_range(scene, "smoothgrad")):
        total = total + given(evidence.gradient, Need.GRADIENT).double().sum(dim=0)
        yield Step(done=done, total=samples, best=functools.partial(_quotient, total, done))


def _integrated_gradients(scene: Scene) -> Iterator[Step]:
    """Integrated gradients (Sundararajan et al., arXiv:1703.01365, equation 1): x * integral of dy/dx at a x, a from 0 to 1.

    The baseline is 0 in the model's input space, the mean colour of a normalised image. The integral is the Gauss-Legendre rule
    with `steps` nodes (50), as captum's default. Completeness: the map sums to y(x) - y(0), up to the rule's error, which shows
    whether more steps are worth while. Nodes are visited in a scattered order and a partial map is the weighted mean over those
    so far.
    """
    steps = at_least_one(scene.parameters.steps, _INTEGRAL_STEPS, name="steps", method="integrated-gradients")
    nodes, shares = np.polynomial.legendre.leggauss(steps)
    order = spread(steps)
    inputs = scene.inputs
    places, weights = (torch.from_numpy(values)[order].to(inputs.device) for values in ((nodes + 1) / 2, shares / 2))
    total, weight = torch.zeros_like(inputs[0], dtype=torch.float64), 0.0
    for chunk in chunks(steps, scene.chunk_rows):
        scaled = places[chunk].reshape(-1, *[1] * (inputs.ndim - 1)).to(widen(inputs).dtype) * inputs
        gradient = given(scene.evidence(scaled.to(inputs.dtype)).gradient, Need.GRADIENT).double()
        total = total + inputs[0].double() * torch.tensordot(weights[chunk], gradient, dims=1)
        # The rule's weights sum to 1, up to rounding.
        weight = 1.0 if chunk.stop == steps else weight + float(np.sum(shares[order[chunk].numpy()] / 2))
        yield Step(done=chunk.stop, total=steps, best=functools.partial(_quotient, total, weight))


def _quotient(total: Float[Tensor, "*shape"], count: float) -> Float[Tensor, "*shape"]:
    return (total / count).float()


def _smooth_grad_cam_plus_plus(scene: Scene) -> Iterator[Step]:
    """Smooth Grad-CAM++ (Omeiza et al., arXiv:1908.01224): Grad-CAM++ with g, g^2 and g^3 averaged over noisy copies.

    sum_k w_k A_k with w = sum over cells of alpha ReLU(mean g), alpha = mean g^2 / (2 mean g^2 + (sum A) mean g^3), and A that of
    the row as it is. Without noise that is Grad-CAM++. The powers are taken in float64, where small gradients survive; alpha is 0
    where its denominator vanishes. `samples` (25), `noise` (0.15 of the input's range) and `seed` are as SmoothGrad's.
    """
    method = "smooth-grad-cam++"
    samples = at_least_one(scene.parameters.samples, _SAMPLES, name="samples", method=method)
    activation = widen(scene.activation)
    totals = torch.zeros(3, *activation.shape[1:], dtype=torch.float64, device=activation.device)
    for done, evidence in _noisy_evidence(scene, samples, _share_of_range(scene, method)):
        gradient = given(evidence.gradient, Need.GRADIENT).double()
        totals = totals + torch.stack([(gradient**power).sum(dim=0) for power in (1, 2, 3)])
        yield Step(done=done, total=samples, best=functools.partial(_weigh_moments, activation, totals, done))


def _weigh_moments(
    activation: Float[Tensor, "1 c *space"], totals: Float[Tensor, "3 c *space"], samples: int
) -> Float[Tensor, "*space"]:
    mean, squared, cubed = (totals / samples).unsqueeze(1)
    product = sum_space(activation.double()) * cubed / torch.where(squared == 0, 1, squared)
    denominator = 2 + product
    is_usable = denominator.abs() > 4 * torch.finfo(product.dtype).eps * (2 + product.abs())
    alpha = torch.where(is_usable, 1 / torch.where(is_usable, denominator, 1), 0)
    # NaN compares false above and would be hidden: carry it on, so that the map is flagged.
    alpha = torch.where(torch.isfinite(product), alpha, torch.nan)
    weights = sum_space(alpha * mean.clamp_min(0)).to(activation.dtype)
    return (weights * activation).sum(dim=1)[0]


def _torchcam_smooth_grad_cam_plus_plus(scene: Scene) -> Iterator[Step]:
    """As torchcam 0.5: ReLU(g) and the map's A are those of the last noisy copy, since its hooks were overwritten.

    g^3 is multiplied by the clean A inside the sum over cells. `samples` is 4 unless set; `noise` is the standard deviation
    itself, 0.3 unless set, not a share of the input's range.
    """
    method = "smooth-grad-cam++"
    samples = at_least_one(scene.parameters.samples, _TORCHCAM_SAMPLES, name="samples", method=method)
    deviation = noise_share(scene.parameters.noise, _TORCHCAM_NOISE, method=method)
    clean = widen(scene.activation)
    squared = cubed = torch.zeros_like(clean)
    for done, evidence in _noisy_evidence(scene, samples, deviation):
        gradient = given(evidence.gradient, Need.GRADIENT)
        squared = squared + (gradient**2).sum(dim=0, keepdim=True)
        cubed = cubed + (gradient**3).sum(dim=0, keepdim=True)
        moments = clean, squared / done, cubed / done
        last = Evidence(activation=widen(evidence.activation)[-1:].clone(), gradient=gradient[-1:].clone())
        yield Step(done=done, total=samples, best=functools.partial(_weigh_last, moments, last))


def _weigh_last(moments: tuple[Tensor, Tensor, Tensor], last: Evidence) -> Float[Tensor, "*space"]:
    clean, squared, cubed = moments
    alpha = squared / (2 * squared + sum_space(cubed * clean) + 1e-8)
    weights = sum_space(alpha * given(last.gradient, Need.GRADIENT).clamp_min(0))
    return (weights * last.activation).sum(dim=1)[0]


_GRADIENT = frozenset({Need.GRADIENT})
_NEITHER_LIBRARY = frozenset({Profile.PYTORCH_GRAD_CAM, Profile.TORCHCAM})

SAMPLING: tuple[Method, ...] = (
    Method(
        slug="smoothgrad",
        title="SmoothGrad",
        paper="Smilkov et al., SmoothGrad, arXiv:1706.03825: 1/n sum_i dy/dx at x + noise_i",
        family=Family.INPUT_SPACE,
        work=WorkClass.AMPLIFIED,
        cost="one whole gradient a noisy copy, usually 25",
        arithmetic=Amplified(_smoothgrad, has_channels=True),
        reads=Reads.INPUT,
        needs=_GRADIENT,
        absent_from=_NEITHER_LIBRARY,
        parameters=frozenset({"samples", "noise", "seed"}),
    ),
    Method(
        slug="integrated-gradients",
        title="Integrated gradients",
        paper="Sundararajan et al., Axiomatic Attribution, arXiv:1703.01365, equation 1: x * integral of dy/dx at a x over a",
        family=Family.INPUT_SPACE,
        work=WorkClass.AMPLIFIED,
        cost="one whole gradient a step, usually 50",
        arithmetic=Amplified(_integrated_gradients, has_channels=True),
        reads=Reads.INPUT,
        needs=_GRADIENT,
        absent_from=_NEITHER_LIBRARY,
        parameters=frozenset({"steps"}),
    ),
    Method(
        slug="smooth-grad-cam++",
        title="Smooth Grad-CAM++",
        paper="Omeiza et al., Smooth Grad-CAM++, arXiv:1908.01224: Grad-CAM++ of g, g^2 and g^3 averaged over noisy copies",
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.AMPLIFIED,
        cost="one forward and one gradient a noisy copy, usually 25",
        arithmetic=Amplified(_smooth_grad_cam_plus_plus),
        needs=_GRADIENT,
        rectifies=True,
        variants={Profile.TORCHCAM: Amplified(_torchcam_smooth_grad_cam_plus_plus)},
        absent_from=frozenset({Profile.PYTORCH_GRAD_CAM}),
        parameters=frozenset({"samples", "noise", "seed"}),
    ),
)

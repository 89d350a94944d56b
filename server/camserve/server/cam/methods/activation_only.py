"""Methods that weigh channels without asking the head: by the activation's own statistics, or by chance."""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.server.cam.methods.method import Evidence, Family, Layerwise, Method, WorkClass
from camserve.server.cam.methods.numerics import sum_space, widen
from camserve.server.jobs import Profile

__all__ = ["ACTIVATION_ONLY"]

# K of the K-sigma rule; the paper's, pytorch-grad-cam's and Xplique's.
_FEM_SIGMAS = 2.0
# A channel whose range is fewer steps than this at its magnitude is constant but for rounding.
_ROUNDING_STEPS = 16


def _statistics(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean and standard deviation over its cells, (b c *ones) both."""
    cells = activation[0, 0].numel()
    mean = sum_space(activation) / cells
    return mean, (sum_space((activation - mean) ** 2) / cells).sqrt()


def _fem(evidence: Evidence) -> Tensor:
    """sum_k mu_k [A_k >= mu_k + 2 sigma_k]: each channel's outstanding cells, worth its mean.

    In a constant channel every cell reaches the threshold and none stands out: it counts for nothing.
    """
    activation = widen(evidence.activation)
    mean, deviation = _statistics(activation)
    space = tuple(range(2, activation.ndim))
    low, high = activation.amin(dim=space, keepdim=True), activation.amax(dim=space, keepdim=True)
    rounding = _ROUNDING_STEPS * torch.finfo(activation.dtype).eps * torch.maximum(low.abs(), high.abs())
    stands_out = (activation >= mean + _FEM_SIGMAS * deviation) & (high - low > rounding)
    return mean * stands_out


def _fem_by_share(evidence: Evidence) -> Tensor:
    """As pytorch-grad-cam has it: A_k itself, weighed by the share of its cells above mu_k + 2 sigma_k."""
    activation = widen(evidence.activation)
    mean, deviation = _statistics(activation)
    is_above = (activation > mean + _FEM_SIGMAS * deviation).to(activation.dtype)
    return sum_space(is_above) / activation[0, 0].numel() * activation


def _random_cam(evidence: Evidence) -> Tensor:
    """Weights drawn evenly from -1 to 1 for each channel, by the spec's seed.

    Every row has the same weights, whatever its batch, and every device draws the same. pytorch-grad-cam draws others for each
    row from numpy's global generator, which nobody can draw again: there is nothing of it to follow.
    """
    activation = widen(evidence.activation)
    generator = torch.Generator().manual_seed(evidence.parameters.seed)
    weight = 2 * torch.rand(activation.shape[1], generator=generator, dtype=torch.float64) - 1
    return weight.to(activation).reshape(-1, *[1] * (activation.ndim - 2)) * activation


ACTIVATION_ONLY = (
    Method(
        slug="fem",
        title="FEM",
        paper="Fuad et al., IPTA 2020, doi:10.1109/IPTA50016.2020.9286629: sum_k mu_k [A_k >= mu_k + 2 sigma_k]",
        rectifies=False,
        has_target=False,
        family=Family.COMPONENTS,
        work=WorkClass.FORWARD_ONLY,
        cost="one forward",
        arithmetic=Layerwise(_fem),
        variants={Profile.PYTORCH_GRAD_CAM: Layerwise(_fem_by_share)},
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
    Method(
        slug="random-cam",
        title="Random-CAM",
        paper="no paper of its own: the control that Adebayo et al., arXiv:1810.03292, ask for; channels weighed by chance",
        rectifies=True,
        has_target=False,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.FORWARD_ONLY,
        cost="one forward",
        arithmetic=Layerwise(_random_cam),
        parameters=frozenset({"seed"}),
        can_smooth_eigen=True,
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
)

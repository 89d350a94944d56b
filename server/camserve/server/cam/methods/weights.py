"""Methods that weigh channels by their gradient, or by the head's own weights: CAM, Grad-CAM and its relatives.

`weigh` functions take the evidence of one layer and give each channel's contribution (b c *space), whose sum is the map. No row's
map depends on another row's values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.server.cam.methods.method import Contrast, Evidence, Family, Layerwise, Method, Need, WorkClass
from camserve.server.cam.methods.numerics import given, sum_space, widen
from camserve.server.jobs import Fusion, Profile

__all__ = ["WEIGHTED", "grad_cam"]


def _cam(evidence: Evidence) -> Tensor:
    weight = given(evidence.class_weight, Need.LINEAR_HEAD)
    activation = widen(evidence.activation)
    return weight.reshape(*weight.shape, *[1] * (activation.ndim - 2)) * activation


def grad_cam(evidence: Evidence) -> Tensor:
    """Grad-CAM, arXiv:1610.02391, equations 1 and 2: each channel weighed by its mean gradient; (b c *space), before the ReLU."""
    activation, gradient = widen(evidence.activation), given(evidence.gradient, Need.GRADIENT)
    cells = activation[0, 0].numel()
    return sum_space(gradient) / cells * activation


def _grad_cam_plus_plus(evidence: Evidence) -> Tensor:
    """Equation 19, alpha = g^2 / (2 g^2 + (sum A) g^3), cancelled to 1 / (2 + (sum A) g) so that small gradients survive.

    Only cells with g > 0 count, since the weight is the sum of alpha * ReLU(g). Where 2 + (sum A) g vanishes, which takes a
    negative sum of A, alpha has no value and the cell counts for nothing.
    """
    activation, gradient = widen(evidence.activation), given(evidence.gradient, Need.GRADIENT)
    product = sum_space(activation) * gradient
    denominator = 2 + product
    # Within rounding of zero the quotient would be noise of any size and either sign.
    is_usable = denominator.abs() > 4 * torch.finfo(product.dtype).eps * (2 + product.abs())
    alpha = torch.where(is_usable, 1 / torch.where(is_usable, denominator, 1), 0)
    # NaN compares false above and would be hidden: carry it on, so that the map is flagged.
    alpha = torch.where(torch.isfinite(product), alpha, torch.nan)
    return sum_space(alpha * gradient.clamp_min(0)) * activation


def _grad_cam_plus_plus_with_epsilon(evidence: Evidence) -> Tensor:
    """As pytorch-grad-cam 1.5 has it: 1e-6 in the denominator, which matters as soon as g is near 1e-3."""
    activation, gradient = widen(evidence.activation), given(evidence.gradient, Need.GRADIENT)
    squared = gradient**2
    alpha = squared / (2 * squared + sum_space(activation) * (squared * gradient) + 1e-6)
    alpha = torch.where(gradient != 0, alpha, 0)
    return sum_space(alpha * gradient.clamp_min(0)) * activation


def _cubed_gradient(evidence: Evidence) -> Tensor:
    """What torchcam 0.5 computes as Grad-CAM++: its division is lost in a temporary, which leaves the sum of ReLU(g)^3."""
    activation, gradient = widen(evidence.activation), given(evidence.gradient, Need.GRADIENT)
    return sum_space(gradient.clamp_min(0) ** 3) * activation


def _xgrad_cam(evidence: Evidence) -> Tensor:
    """The channel's weight is its mean gradient, weighted by the activation.

    Where the activation sums to zero, within rounding, those weights have no total: the plain mean takes their place. It is what
    the weighted mean equals whenever the gradient is constant, so XGrad-CAM stays Grad-CAM on average pooling and a linear head.
    """
    activation, gradient = widen(evidence.activation), given(evidence.gradient, Need.GRADIENT)
    cells = activation[0, 0].numel()
    total = sum_space(activation)
    is_usable = total.abs() > cells * torch.finfo(total.dtype).eps * sum_space(activation.abs())
    weighted = sum_space(gradient * activation) / torch.where(is_usable, total, 1)
    weight = torch.where(is_usable | total.isnan(), weighted, sum_space(gradient) / cells)
    return weight * activation


def _xgrad_cam_with(epsilon: float) -> Layerwise:
    """As the libraries have it: a constant is added to the sum of A, whatever its sign and size."""

    def weigh(evidence: Evidence) -> Tensor:
        activation, gradient = widen(evidence.activation), given(evidence.gradient, Need.GRADIENT)
        weight = sum_space(gradient * activation / (sum_space(activation) + epsilon))
        return weight * activation

    return Layerwise(weigh)


_GRADIENT = frozenset({Need.GRADIENT})

WEIGHTED = (
    Method(
        slug="cam",
        title="CAM",
        paper="Zhou et al., Learning Deep Features for Discriminative Localization, arXiv:1512.04150, equation 2: sum_k w_ck A_k",
        needs=frozenset({Need.LINEAR_HEAD}),
        rectifies=False,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.FORWARD_ONLY,
        cost="one forward",
        arithmetic=Layerwise(_cam),
        can_smooth_eigen=True,
        absent_from=frozenset({Profile.PYTORCH_GRAD_CAM}),
    ),
    Method(
        slug="grad-cam",
        title="Grad-CAM",
        paper="Selvaraju et al., Grad-CAM, arXiv:1610.02391, equations 1 and 2: ReLU sum_k mean_ij(g_k) A_k",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(grad_cam),
        can_smooth_eigen=True,
    ),
    Method(
        slug="grad-cam++",
        title="Grad-CAM++",
        paper="Chattopadhyay et al., Grad-CAM++, arXiv:1710.11063, eq. 19: weight sum_ij g^2 / (2 g^2 + (sum A) g^3) ReLU(g)",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(_grad_cam_plus_plus),
        can_smooth_eigen=True,
        variants={
            Profile.PYTORCH_GRAD_CAM: Layerwise(_grad_cam_plus_plus_with_epsilon),
            Profile.TORCHCAM: Layerwise(_cubed_gradient),
        },
    ),
    Method(
        slug="xgrad-cam",
        title="XGrad-CAM",
        paper="Fu et al., Axiom-based Grad-CAM, arXiv:2008.02312: weight sum_ij g A / sum_ij A",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(_xgrad_cam),
        can_smooth_eigen=True,
        variants={Profile.PYTORCH_GRAD_CAM: _xgrad_cam_with(1e-7), Profile.TORCHCAM: _xgrad_cam_with(1e-8)},
    ),
    Method(
        slug="finer-cam",
        title="Finer-CAM",
        paper="Zhang et al., Finer-CAM, arXiv:2501.11309: Grad-CAM of y_c - gamma y_d, over the 3 classes d nearest in score",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(grad_cam),
        # Grad-CAM is linear in the score, so the mean over the classes may be taken of scores rather than of maps.
        contrast={
            Profile.PAPER: Contrast(classes=3, weight=0.6),
            Profile.PYTORCH_GRAD_CAM: Contrast(classes=3, weight=1.0, by_probability=True),
            Profile.TORCHCAM: Contrast(classes=3, weight=0.6),
        },
        parameters=frozenset({"similar_classes", "contrast"}),
        can_smooth_eigen=True,
    ),
    Method(
        slug="refine-cam",
        title="RefineCAM",
        paper="How to Evaluate and Refine your CAM, arXiv:2605.14641: the product of several layers' normalised Grad-CAM++ maps",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        # The paper refines any CAM; Grad-CAM++ is what both libraries take unless told otherwise.
        arithmetic=Layerwise(_grad_cam_plus_plus),
        variants={
            Profile.PYTORCH_GRAD_CAM: Layerwise(_grad_cam_plus_plus_with_epsilon),
            Profile.TORCHCAM: Layerwise(_cubed_gradient),
        },
        fusion=Fusion.PRODUCT,
        can_smooth_eigen=True,
    ),
)

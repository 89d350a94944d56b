"""Methods that look at how the gradient itself changes: the score's curvature at the layer."""

from __future__ import annotations

from torch import Tensor

from camserve.server.cam.methods.method import Evidence, Family, Layerwise, Method, Need, WorkClass
from camserve.server.cam.methods.numerics import given, sum_space, widen
from camserve.server.jobs import Profile

__all__ = ["SECOND_ORDER"]


def _shapley_cam(evidence: Evidence) -> Tensor:
    """The second-order estimate of each channel's Shapley value: w_k = mean_ij(g - (H A) / 2), times A_k.

    Behind the layer, a net of linear layers and ReLUs has no curvature: there this is Grad-CAM, unless the score has some, as the
    paper's ReST score does.
    """
    activation, gradient = widen(evidence.activation), given(evidence.gradient, Need.GRADIENT)
    curvature = given(evidence.curvature, Need.CURVATURE)
    cells = activation[0, 0].numel()
    return sum_space(gradient - 0.5 * curvature) / cells * activation


SECOND_ORDER = (
    Method(
        slug="shapley-cam",
        title="ShapleyCAM",
        paper="Cai, CAMs as Shapley Value-based Explainers, arXiv:2501.06261: ReLU sum_k mean_ij(g - H A / 2) A_k",
        needs=frozenset({Need.GRADIENT, Need.CURVATURE}),
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient and its derivative",
        arithmetic=Layerwise(_shapley_cam),
        can_smooth_eigen=True,
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
)

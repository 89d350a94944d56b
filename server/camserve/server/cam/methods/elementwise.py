"""Methods that multiply gradient and activation cell by cell: HiResCAM and its relatives.

Their maps keep the gradient's detail, where the Grad-CAM family in `weights.py` keeps one weight for each channel.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.method import Evidence, Family, Layerwise, Method, Need, WorkClass
from camserve.server.cam.methods.numerics import given, positive_part, widen
from camserve.server.jobs import Profile

__all__ = ["ELEMENTWISE", "pool_windows"]

_SEG_XRES_WINDOW = 2


def pool_windows(values: Float[Tensor, "b c *space"], window: int) -> Float[Tensor, "b c *space"]:
    """Puts each window's largest value in all of its cells; windows start at the origin and may be cut short at the far edges."""
    for axis in range(2, values.ndim):
        size = values.shape[axis]
        side = min(window, size)
        missing = -size % side
        padding = [0, 0] * (values.ndim - 1 - axis) + [0, missing]
        padded = torch.nn.functional.pad(values, padding, value=-torch.inf)
        largest = padded.reshape(*values.shape[:axis], -1, side, *values.shape[axis + 1 :]).amax(dim=axis + 1)
        values = largest.repeat_interleave(side, dim=axis).narrow(axis, 0, size)
    return values


def _hirescam(evidence: Evidence) -> Tensor:
    return given(evidence.gradient, Need.GRADIENT) * widen(evidence.activation)


def _layercam(evidence: Evidence) -> Tensor:
    return positive_part(given(evidence.gradient, Need.GRADIENT)) * widen(evidence.activation)


def _grad_cam_elementwise(evidence: Evidence) -> Tensor:
    """HiResCAM with each channel's product rectified, so that no channel takes away what another gives: sum_k ReLU(g_k A_k)."""
    return positive_part(_hirescam(evidence))


def _seg_xres_cam(evidence: Evidence) -> Tensor:
    """sum_k up(pool(g_k)) A_k: HiResCAM with the gradient pooled by maximum and put back by nearest neighbour.

    The official code (Nouman97/Seg_XRes_CAM) fills windows that reach beyond the layer with zeros and stretches the pooled
    gradient over it; here the last window is as large as the layer leaves it. Where the window divides the layer, both agree.
    """
    window = evidence.parameters.window or _SEG_XRES_WINDOW
    return pool_windows(given(evidence.gradient, Need.GRADIENT), window) * widen(evidence.activation)


_GRADIENT = frozenset({Need.GRADIENT})

ELEMENTWISE = (
    Method(
        slug="hirescam",
        title="HiResCAM",
        paper="Draelos and Carin, Use HiResCAM instead of Grad-CAM, arXiv:2011.08891: sum_k g_k A_k cell by cell",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(_hirescam),
        can_smooth_eigen=True,
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
    Method(
        slug="grad-cam-elementwise",
        title="Element-wise Grad-CAM",
        paper="no paper of its own: pytorch-grad-cam's sum_k ReLU(g_k A_k), HiResCAM (arXiv:2011.08891) of rectified products",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(_grad_cam_elementwise),
        can_smooth_eigen=True,
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
    Method(
        slug="layercam",
        title="LayerCAM",
        paper="Jiang et al., LayerCAM, IEEE TIP 30 (2021), doi:10.1109/TIP.2021.3089943: ReLU sum_k ReLU(g_k) A_k cell by cell",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(_layercam),
        can_smooth_eigen=True,
    ),
    Method(
        slug="seg-xres-cam",
        title="Seg-XRes-CAM",
        paper="Hasany et al., Seg-XRes-CAM, CVPR Workshops 2023, after arXiv:2002.11434: ReLU sum_k up(pool(g_k)) A_k",
        needs=_GRADIENT,
        rectifies=True,
        family=Family.GRADIENT_WEIGHTED,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(_seg_xres_cam),
        parameters=frozenset({"window"}),
        can_smooth_eigen=True,
        absent_from=frozenset({Profile.PYTORCH_GRAD_CAM, Profile.TORCHCAM}),
    ),
)

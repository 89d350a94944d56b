"""Methods that look for the strongest common direction of the cells' channel vectors: Eigen-CAM and its relatives.

`first_component` also takes the place of the sum over channels where a spec asks for eigen smoothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.method import Evidence, Family, Layerwise, Method, WorkClass
from camserve.server.cam.methods.numerics import widen
from camserve.server.jobs import Profile

__all__ = ["COMPONENTS", "first_component"]


def first_component(products: Float[Tensor, "b c *space"]) -> Float[Tensor, "b *space"]:
    """Projects every cell's centred channel vector on the first principal component of the cells (arXiv:2008.00299).

    With X (cells x channels), each channel centred, the map is u1 * s1 of its singular value decomposition: found from the
    eigenvectors of the smaller of X X^T and X^T X, in float64 because forming either squares the condition number.

    A component has no sign of its own. Ours correlates positively with the mean activation; if that correlation is zero, the cell
    of largest magnitude, the first of them in row-major order, is positive.
    """
    result_dtype = widen(products[:0]).dtype
    cells = products.flatten(2).double()
    is_finite = cells.isfinite().all(dim=2).all(dim=1)
    # The eigensolver raises on NaN and would take the neighbours with it.
    cells = torch.where(is_finite[:, None, None], cells, 0)
    mean_activation = cells.mean(dim=1)
    cells = cells - cells.mean(dim=2, keepdim=True)
    # A common factor changes nothing but keeps squares of tiny and huge activations in range.
    scale = cells.abs().amax(dim=(1, 2), keepdim=True)
    cells = cells / torch.where(scale > 0, scale, 1)
    by_cell = cells.transpose(1, 2)
    if by_cell.shape[1] <= by_cell.shape[2]:
        values, vectors = torch.linalg.eigh(by_cell @ cells)
        component = vectors[:, :, -1] * values[:, -1:].clamp_min(0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(cells @ by_cell)
        component = (by_cell @ vectors[:, :, -1:]).squeeze(2)
    agreement = (component * (mean_activation - mean_activation.mean(dim=1, keepdim=True))).sum(dim=1)
    largest = component.gather(1, component.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    sign = torch.where(torch.where(agreement != 0, agreement, largest) < 0, -1.0, 1.0)
    component = component * sign[:, None] * scale[:, :, 0]
    component = torch.where(is_finite[:, None], component, torch.nan)
    return component.reshape(products.shape[0], *products.shape[2:]).to(result_dtype)


def _activation(evidence: Evidence) -> Tensor:
    return widen(evidence.activation)


COMPONENTS = (
    Method(
        slug="eigen-cam",
        title="Eigen-CAM",
        paper="Muhammad and Yeasin, Eigen-CAM, arXiv:2008.00299: projection of A on its first principal component",
        needs=frozenset(),
        rectifies=False,
        family=Family.COMPONENTS,
        work=WorkClass.FORWARD_ONLY,
        cost="one forward",
        arithmetic=Layerwise(_activation, first_component),
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
)

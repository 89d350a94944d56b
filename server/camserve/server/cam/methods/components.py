"""Methods that look for the strongest common direction of the cells' channel vectors: Eigen-CAM and its relatives.

`first_component` also takes the place of the sum over channels where a spec asks for eigen smoothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.method import Evidence, Family, Layerwise, Method, Need, WorkClass
from camserve.server.cam.methods.numerics import given, widen
from camserve.server.errors import Reason, Unsupported
from camserve.server.jobs import Profile

__all__ = ["COMPONENTS", "first_component", "first_component_by_peak", "first_kernel_component"]

# A decomposition of this side takes some two seconds on a CPU core; 40 x 40 cells are more than any usual last stage has.
_MOST_KERNEL_CELLS = 1600


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
    component = _orient(component, mean_activation) * scale[:, :, 0]
    component = torch.where(is_finite[:, None], component, torch.nan)
    return component.reshape(products.shape[0], *products.shape[2:]).to(result_dtype)


def _orient(component: Float[Tensor, "b cells"], mean: Float[Tensor, "b cells"]) -> Float[Tensor, "b cells"]:
    """Gives a component a sign: that of its correlation with the mean, or else of its cell of largest magnitude."""
    agreement = (component * (mean - mean.mean(dim=1, keepdim=True))).sum(dim=1)
    largest = component.gather(1, component.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    sign = torch.where(torch.where(agreement != 0, agreement, largest) < 0, -1.0, 1.0)
    return component * sign[:, None]


def first_component_by_peak(products: Float[Tensor, "b c *space"]) -> Float[Tensor, "b *space"]:
    """`first_component` with the sign of Seg-Eigen-CAM, equation 13: turned over where |min| > |max|."""
    component = first_component(products)
    cells = component.flatten(1)
    is_turned = -cells.amin(dim=1) > cells.amax(dim=1)
    return torch.where(is_turned.reshape(-1, *[1] * (component.ndim - 1)), -component, component)


def first_kernel_component(products: Float[Tensor, "b c *space"]) -> Float[Tensor, "b *space"]:
    """Projects every cell on the first principal component in the feature space of a sigmoid kernel (arXiv:2410.00267).

    With X (cells x channels), each channel centred, K = tanh(X X^T / channels + 1) is centred in feature space, and the map is
    its eigenvector of the largest eigenvalue times that eigenvalue's root: scikit-learn's `KernelPCA` at its defaults, which
    pytorch-grad-cam calls. The sign is that of `first_component`. The kernel has no smaller twin, so its side is the number of
    cells and the work grows with its cube.

    Raises:
        Unsupported: the layer has more cells than are worth it.
    """
    cells_count = products[0, 0].numel()
    if cells_count > _MOST_KERNEL_CELLS:
        raise Unsupported(
            Reason.LAYER_UNUSABLE,
            f"kpca-cam compares every two cells of a layer and takes layers of at most {_MOST_KERNEL_CELLS} cells; this one has "
            f"{cells_count}: choose a deeper layer, or eigen-cam, which has no such limit",
            metadata={"cells": cells_count, "limit": _MOST_KERNEL_CELLS},
        )
    rows = [_first_kernel_component(row.flatten(1).T.double()) for row in products]
    return torch.stack(rows).reshape(products.shape[0], *products.shape[2:]).to(widen(products[:0]).dtype)


def _first_kernel_component(cells: Float[Tensor, "cells c"]) -> Float[Tensor, "cells"]:
    if not bool(cells.isfinite().all()):
        return torch.full_like(cells[:, 0], torch.nan)
    centred = cells - cells.mean(dim=0)
    kernel = (centred @ centred.T / cells.shape[1] + 1).tanh()
    kernel = kernel - kernel.mean(dim=0) - kernel.mean(dim=1, keepdim=True) + kernel.mean()
    values, vectors = torch.linalg.eigh(kernel)
    # What rounding leaves of a kernel without spread is no component.
    spread = torch.where(values[-1] > cells.shape[0] * torch.finfo(values.dtype).eps, values[-1], 0)
    return _orient((vectors[:, -1] * spread.sqrt())[None], cells.mean(dim=1)[None])[0]


def _activation(evidence: Evidence) -> Tensor:
    return widen(evidence.activation)


def _product(evidence: Evidence) -> Tensor:
    return given(evidence.gradient, Need.GRADIENT) * widen(evidence.activation)


def _magnitude_product(evidence: Evidence) -> Tensor:
    """|g| A, Seg-Eigen-CAM's equation 10: cells count by how much they matter, for or against."""
    return given(evidence.gradient, Need.GRADIENT).abs() * widen(evidence.activation)


_ABSENT = frozenset({Profile.TORCHCAM})

COMPONENTS = (
    Method(
        slug="eigen-cam",
        title="Eigen-CAM",
        paper="Muhammad and Yeasin, Eigen-CAM, arXiv:2008.00299: projection of A on its first principal component",
        rectifies=False,
        has_target=False,
        family=Family.COMPONENTS,
        work=WorkClass.FORWARD_ONLY,
        cost="one forward",
        arithmetic=Layerwise(_activation, first_component),
        absent_from=_ABSENT,
    ),
    Method(
        slug="eigen-grad-cam",
        title="Eigen-Grad-CAM",
        paper="no paper of its own: pytorch-grad-cam's Eigen-CAM (arXiv:2008.00299) of g A in place of A",
        needs=frozenset({Need.GRADIENT}),
        rectifies=False,
        family=Family.COMPONENTS,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(_product, first_component),
        absent_from=_ABSENT,
    ),
    Method(
        slug="seg-eigen-cam",
        title="Seg-Eigen-CAM",
        paper="Chung and Ying, Seg-Eigen-CAM, Appl. Sci. 15 (2025), doi:10.3390/app15137562, eq. 10 to 13: Eigen-CAM of |g| A",
        needs=frozenset({Need.GRADIENT}),
        rectifies=False,
        family=Family.COMPONENTS,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Layerwise(_magnitude_product, first_component_by_peak),
        absent_from=_ABSENT,
    ),
    Method(
        slug="kpca-cam",
        title="KPCA-CAM",
        paper="Karmani et al., KPCA-CAM, arXiv:2410.00267: projection of A on its first component under a sigmoid kernel",
        rectifies=False,
        has_target=False,
        family=Family.COMPONENTS,
        work=WorkClass.FORWARD_ONLY,
        cost="one forward, and the cube of the layer's cells",
        arithmetic=Layerwise(_activation, first_kernel_component),
        absent_from=_ABSENT,
    ),
)

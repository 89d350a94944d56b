"""How activations and gradients become a map: one pure function for each method, and the table that lists them.

An activation A arrives channels first, (b c *space) with one to three spatial axes, with the gradient g = dy/dA of the target
score or the head's weights of one class, whichever the method needs. What leaves is the raw signed map (b *space) before any
rectification: `maps.py` goes on from there, and `engine/passes.py` calls both. Adding a method means adding to this file only.

Half precision is widened to float32 before the first sum; float64 stays. No row's map depends on another row's values.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.errors import Reason, Unsupported
from camserve.server.jobs import Profile

__all__ = ["METHODS", "Method", "Need", "WorkClass", "find_method"]


class Need(enum.StrEnum):
    """What a method is computed from, besides the activation that all of them need."""

    GRADIENT = "gradient"
    LINEAR_HEAD = "linear head"


class WorkClass(enum.StrEnum):
    """How much of the device a method takes; the scheduler's words."""

    FORWARD_ONLY = "A"
    ONE_GRADIENT = "B"


class Compute(Protocol):
    """A method's arithmetic."""

    def __call__(
        self,
        activation: Float[Tensor, "b c *space"],
        gradient: Float[Tensor, "b c *space"] | None,
        class_weight: Float[Tensor, "b c"] | None,
        /,
    ) -> Float[Tensor, "b *space"]:
        """Returns the raw signed map; float32, or float64 for a float64 activation."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One line of the table.

    Attributes:
        slug: its name in requests, file names and records.
        title: its name in prose.
        paper: where it was published, and which equation is computed.
        needs: what `compute` must be given besides the activation; the other arguments may be None.
        rectifies: whether the paper ends in a ReLU, so that negative evidence is dropped unless the caller says otherwise.
        work: what it costs the scheduler.
        compute: the paper's arithmetic.
        variants: the arithmetic of libraries where it differs from the paper's.
        absent_from: profiles of libraries that do not have the method.
    """

    slug: str
    title: str
    paper: str
    needs: frozenset[Need]
    rectifies: bool
    work: WorkClass
    compute: Compute
    variants: Mapping[Profile, Compute] = dataclasses.field(default_factory=dict)
    absent_from: frozenset[Profile] = frozenset()

    def under(self, profile: Profile) -> Compute:
        """The arithmetic under a profile's conventions.

        Raises:
            Unsupported: the library that the profile is named for has no such method.
        """
        if profile in self.absent_from:
            raise Unsupported(
                Reason.METHOD_NOT_IMPLEMENTED,
                f"profile {profile.value!r} has no {self.slug}: that library does not offer it; use profile 'paper'",
                metadata={"method": self.slug, "profile": profile.value},
            )
        return self.variants.get(profile, self.compute)

    def rectifies_under(self, profile: Profile) -> bool:
        """Whether negative values are dropped by default; both libraries do so for every method but torchcam's plain CAM."""
        if profile is Profile.PYTORCH_GRAD_CAM:
            return True
        return self.rectifies


def find_method(text: str) -> Method:
    """Finds a method by its slug; case, hyphens, underscores and spaces do not matter, so `GradCAM++` is `grad-cam++`.

    Raises:
        Unsupported: there is none of that name; the message tells the nearest and all that exist.
    """
    known = {_squeeze(slug): method for slug, method in METHODS.items()}
    wanted = _squeeze(text)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
    hint = f"; did you mean {known[near[0]].slug!r}?" if near else ""
    raise Unsupported(
        Reason.METHOD_NOT_IMPLEMENTED,
        f"method {text!r} is not known{hint}; known methods: {', '.join(METHODS)}",
        metadata={"method": text, "known": ", ".join(METHODS)},
    )


def _squeeze(text: str) -> str:
    return text.casefold().translate({ord(mark): None for mark in "-_ "})


def _widen(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half formats become float32: g squared underflows in float16, and sums over cells lose their small terms."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _sum_space(values: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *ones"]:
    """Sums each channel over its cells and keeps the axes, so that the result multiplies the channel."""
    return values.sum(dim=tuple(range(2, values.ndim)), keepdim=True)


def _given(value: Tensor | None, what: Need) -> Tensor:
    if value is None:
        raise ValueError(f"this method is computed from a {what.value}; see Method.needs")
    return _widen(value)


def _cam(activation: Tensor, _gradient: Tensor | None, class_weight: Tensor | None, /) -> Tensor:
    weight = _given(class_weight, Need.LINEAR_HEAD)
    activation = _widen(activation)
    return (weight.reshape(*weight.shape, *[1] * (activation.ndim - 2)) * activation).sum(dim=1)


def _grad_cam(activation: Tensor, gradient: Tensor | None, _class_weight: Tensor | None, /) -> Tensor:
    activation, gradient = _widen(activation), _given(gradient, Need.GRADIENT)
    cells = activation[0, 0].numel()
    return (_sum_space(gradient) / cells * activation).sum(dim=1)


def _grad_cam_plus_plus(activation: Tensor, gradient: Tensor | None, _class_weight: Tensor | None, /) -> Tensor:
    """Equation 19, alpha = g^2 / (2 g^2 + (sum A) g^3), cancelled to 1 / (2 + (sum A) g) so that small gradients survive.

    Only cells with g > 0 count, since the weight is the sum of alpha * ReLU(g). Where 2 + (sum A) g vanishes, which takes a
    negative sum of A, alpha has no value and the cell counts for nothing.
    """
    activation, gradient = _widen(activation), _given(gradient, Need.GRADIENT)
    product = _sum_space(activation) * gradient
    denominator = 2 + product
    # Within rounding of zero the quotient would be noise of any size and either sign.
    is_usable = denominator.abs() > 4 * torch.finfo(product.dtype).eps * (2 + product.abs())
    alpha = torch.where(is_usable, 1 / torch.where(is_usable, denominator, 1), 0)
    # NaN compares false above and would be hidden: carry it on, so that the map is flagged.
    alpha = torch.where(torch.isfinite(product), alpha, torch.nan)
    return (_sum_space(alpha * gradient.clamp_min(0)) * activation).sum(dim=1)


def _grad_cam_plus_plus_with_epsilon(
    activation: Tensor, gradient: Tensor | None, _class_weight: Tensor | None, /
) -> Tensor:
    """As pytorch-grad-cam 1.5 has it: 1e-6 in the denominator, which matters as soon as g is near 1e-3."""
    activation, gradient = _widen(activation), _given(gradient, Need.GRADIENT)
    squared = gradient**2
    alpha = squared / (2 * squared + _sum_space(activation) * (squared * gradient) + 1e-6)
    alpha = torch.where(gradient != 0, alpha, 0)
    return (_sum_space(alpha * gradient.clamp_min(0)) * activation).sum(dim=1)


def _cubed_gradient(activation: Tensor, gradient: Tensor | None, _class_weight: Tensor | None, /) -> Tensor:
    """What torchcam 0.5 computes as Grad-CAM++: its division is lost in a temporary, which leaves the sum of ReLU(g)^3."""
    activation, gradient = _widen(activation), _given(gradient, Need.GRADIENT)
    return (_sum_space(gradient.clamp_min(0) ** 3) * activation).sum(dim=1)


def _xgrad_cam(activation: Tensor, gradient: Tensor | None, _class_weight: Tensor | None, /) -> Tensor:
    """The channel's weight is its mean gradient, weighted by the activation.

    Where the activation sums to zero, within rounding, those weights have no total: the plain mean takes their place. It is what
    the weighted mean equals whenever the gradient is constant, so XGrad-CAM stays Grad-CAM on average pooling and a linear head.
    """
    activation, gradient = _widen(activation), _given(gradient, Need.GRADIENT)
    cells = activation[0, 0].numel()
    total = _sum_space(activation)
    is_usable = total.abs() > cells * torch.finfo(total.dtype).eps * _sum_space(activation.abs())
    weighted = _sum_space(gradient * activation) / torch.where(is_usable, total, 1)
    weight = torch.where(is_usable | total.isnan(), weighted, _sum_space(gradient) / cells)
    return (weight * activation).sum(dim=1)


def _xgrad_cam_with(epsilon: float) -> Compute:
    """As the libraries have it: a constant is added to the sum of A, whatever its sign and size."""

    def compute(activation: Tensor, gradient: Tensor | None, _class_weight: Tensor | None, /) -> Tensor:
        activation, gradient = _widen(activation), _given(gradient, Need.GRADIENT)
        weight = _sum_space(gradient * activation / (_sum_space(activation) + epsilon))
        return (weight * activation).sum(dim=1)

    return compute


def _hirescam(activation: Tensor, gradient: Tensor | None, _class_weight: Tensor | None, /) -> Tensor:
    return (_given(gradient, Need.GRADIENT) * _widen(activation)).sum(dim=1)


def _layercam(activation: Tensor, gradient: Tensor | None, _class_weight: Tensor | None, /) -> Tensor:
    return (_given(gradient, Need.GRADIENT).clamp_min(0) * _widen(activation)).sum(dim=1)


def _eigen_cam(activation: Tensor, _gradient: Tensor | None, _class_weight: Tensor | None, /) -> Tensor:
    """Projects every cell's centred channel vector on the first principal component.

    With X (cells x channels), each channel centred, the map is u1 * s1 of its singular value decomposition: found from the
    eigenvectors of the smaller of X X^T and X^T X, in float64 because forming either squares the condition number.

    A component has no sign of its own. Ours correlates positively with the mean activation; if that correlation is zero, the cell
    of largest magnitude, the first of them in row-major order, is positive.
    """
    result_dtype = _widen(activation[:0]).dtype
    cells = activation.flatten(2).double()
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
    return component.reshape(activation.shape[0], *activation.shape[2:]).to(result_dtype)


_GRADIENT = frozenset({Need.GRADIENT})

_TABLE = (
    Method(
        slug="cam",
        title="CAM",
        paper="Zhou et al., Learning Deep Features for Discriminative Localization, arXiv:1512.04150, equation 2: sum_k w_ck A_k",
        needs=frozenset({Need.LINEAR_HEAD}),
        rectifies=False,
        work=WorkClass.FORWARD_ONLY,
        compute=_cam,
        absent_from=frozenset({Profile.PYTORCH_GRAD_CAM}),
    ),
    Method(
        slug="grad-cam",
        title="Grad-CAM",
        paper="Selvaraju et al., Grad-CAM, arXiv:1610.02391, equations 1 and 2: ReLU sum_k mean_ij(g_k) A_k",
        needs=_GRADIENT,
        rectifies=True,
        work=WorkClass.ONE_GRADIENT,
        compute=_grad_cam,
    ),
    Method(
        slug="grad-cam++",
        title="Grad-CAM++",
        paper="Chattopadhyay et al., Grad-CAM++, arXiv:1710.11063, eq. 19: weight sum_ij g^2 / (2 g^2 + (sum A) g^3) ReLU(g)",
        needs=_GRADIENT,
        rectifies=True,
        work=WorkClass.ONE_GRADIENT,
        compute=_grad_cam_plus_plus,
        variants={Profile.PYTORCH_GRAD_CAM: _grad_cam_plus_plus_with_epsilon, Profile.TORCHCAM: _cubed_gradient},
    ),
    Method(
        slug="xgrad-cam",
        title="XGrad-CAM",
        paper="Fu et al., Axiom-based Grad-CAM, arXiv:2008.02312: weight sum_ij g A / sum_ij A",
        needs=_GRADIENT,
        rectifies=True,
        work=WorkClass.ONE_GRADIENT,
        compute=_xgrad_cam,
        variants={Profile.PYTORCH_GRAD_CAM: _xgrad_cam_with(1e-7), Profile.TORCHCAM: _xgrad_cam_with(1e-8)},
    ),
    Method(
        slug="hirescam",
        title="HiResCAM",
        paper="Draelos and Carin, Use HiResCAM instead of Grad-CAM, arXiv:2011.08891: sum_k g_k A_k cell by cell",
        needs=_GRADIENT,
        rectifies=True,
        work=WorkClass.ONE_GRADIENT,
        compute=_hirescam,
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
    Method(
        slug="layercam",
        title="LayerCAM",
        paper="Jiang et al., LayerCAM, IEEE TIP 30 (2021), doi:10.1109/TIP.2021.3089943: ReLU sum_k ReLU(g_k) A_k cell by cell",
        needs=_GRADIENT,
        rectifies=True,
        work=WorkClass.ONE_GRADIENT,
        compute=_layercam,
    ),
    Method(
        slug="eigen-cam",
        title="Eigen-CAM",
        paper="Muhammad and Yeasin, Eigen-CAM, arXiv:2008.00299: projection of A on its first principal component",
        needs=frozenset(),
        rectifies=False,
        work=WorkClass.FORWARD_ONLY,
        compute=_eigen_cam,
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.slug: method for method in _TABLE})

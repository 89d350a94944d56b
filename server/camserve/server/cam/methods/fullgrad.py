"""FullGrad: the score taken apart into what the input contributes and what every constant inside the model contributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.method import Evidence, Family, Method, Need, Reads, Whole, WorkClass
from camserve.server.cam.methods.numerics import enlarge, given, widen
from camserve.server.jobs import Profile

__all__ = ["FULL_GRADIENT", "completeness", "contributions"]


def contributions(evidences: Sequence[Evidence]) -> list[Float[Tensor, "b c *space"]]:
    """What each place contributes to the score: x dx at the input, which comes first, and b g where a layer adds b.

    A linear layer over many cells has its channels last; they are brought to the front.
    """
    at_input, *layers = evidences
    terms = [widen(at_input.activation) * given(at_input.gradient, Need.GRADIENT)]
    for layer in layers:
        gradient, bias = given(layer.gradient, Need.GRADIENT), given(layer.bias, "layer's bias")
        if gradient.shape[1] != len(bias):
            gradient = gradient.movedim(-1, 1)
        terms.append(bias.to(gradient.device).reshape(-1, *[1] * (gradient.ndim - 2)) * gradient)
    return terms


def completeness(evidences: Sequence[Evidence]) -> Float[Tensor, "b"]:
    """The sum of all contributions (arXiv:1905.00780): the score itself, for a net of linear layers and ReLUs.

    What is missing are the constants of other nonlinearities, such as sigmoid or GELU, whose tangents do not pass through zero.
    """
    return torch.stack([term.flatten(1).sum(dim=1) for term in contributions(evidences)]).sum(dim=0)


def _rescale(values: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
    """Puts a place's range, over channels and cells, on [0, 1]; a constant becomes 0, as the official code has it."""
    axes = tuple(range(1, values.ndim))
    low, high = values.amin(dim=axes, keepdim=True), values.amax(dim=axes, keepdim=True)
    return (values - low) / torch.where(high == low, 1, high - low)


def _rescale_by_channel(values: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
    """As pytorch-grad-cam has it: each channel's range, with 1e-7 in the denominator, which drowns gradients near 1e-7."""
    axes = tuple(range(2, values.ndim))
    low, high = values.amin(dim=axes, keepdim=True), values.amax(dim=axes, keepdim=True)
    return (values - low) / (1e-7 + high - low)


def _draw(
    evidences: Sequence[Evidence], rescale: Callable[[Tensor], Tensor], *, aligns_corners: bool
) -> Float[Tensor, "b *space"]:
    terms = contributions(evidences)
    shape = terms[0].shape[2:]
    total = torch.zeros_like(terms[0][:, 0])
    for term in terms:
        # A linear layer's bias lies nowhere in the image: it has no cells to show.
        if term.ndim == terms[0].ndim:
            total = total + enlarge(rescale(term.abs()), shape, aligns_corners=aligns_corners).sum(dim=1)
    return total


def _fullgrad(evidences: Sequence[Evidence]) -> Tensor:
    """sum_c psi(x dx) + sum_layers sum_c psi(b g): psi is the magnitude, rescaled for each place and enlarged.

    As the official code (idiap/fullgrad-saliency): over channels and cells together, corners aligned. Its 1e-6 in the
    denominator is left out, so that weak scores are drawn as strong ones are.
    """
    return _draw(evidences, _rescale, aligns_corners=True)


def _fullgrad_by_channel(evidences: Sequence[Evidence]) -> Tensor:
    """As pytorch-grad-cam has it: each channel is rescaled by itself, and centres lie at half positions."""
    return _draw(evidences, _rescale_by_channel, aligns_corners=False)


FULL_GRADIENT = (
    Method(
        slug="fullgrad",
        title="FullGrad",
        paper="Srinivas and Fleuret, Full-Gradient Representation, arXiv:1905.00780: psi(x dx) + sum_layers sum_c psi(b g)",
        reads=Reads.BIASES,
        needs=frozenset({Need.GRADIENT}),
        rectifies=False,
        family=Family.INPUT_SPACE,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient through the whole model",
        arithmetic=Whole(_fullgrad),
        variants={Profile.PYTORCH_GRAD_CAM: Whole(_fullgrad_by_channel)},
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
)

"""Methods whose map lies on the model's input itself: gradients with respect to pixels, and what is made of them.

Maps keep the input's channels and signs; `cam/saliency.py` brings the channels together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.method import Evidence, Family, Method, Need, Reads, Whole, WorkClass
from camserve.server.cam.methods.numerics import enlarge, given, positive_part, widen
from camserve.server.cam.methods.weights import grad_cam
from camserve.server.jobs import Profile

__all__ = ["INPUT_SPACE"]


def _vanilla_backprop(evidences: Sequence[Evidence]) -> Tensor:
    """dy/dx."""
    return given(evidences[0].gradient, Need.GRADIENT)


def _gradient_times_input(evidences: Sequence[Evidence]) -> Tensor:
    """Input times gradient, x dy/dx; its sum is the score for a net of linear layers and ReLUs without biases."""
    return given(evidences[0].gradient, Need.GRADIENT) * widen(evidences[0].activation)


def _guided_backprop(evidences: Sequence[Evidence]) -> Tensor:
    """dy/dx where every ReLU passes back what is positive, and only where its input was."""
    return given(evidences[0].input_gradient, Need.GUIDED_GRADIENT)


def _deconvnet(evidences: Sequence[Evidence]) -> Tensor:
    """dy/dx where every ReLU passes back what is positive, whatever its input was."""
    return given(evidences[0].input_gradient, Need.DECONVNET_GRADIENT)


def _guided_grad_cam(evidences: Sequence[Evidence]) -> Float[Tensor, "b c *input"]:
    """Guided backpropagation times the rectified Grad-CAM, enlarged linearly; of several layers, times the mean of theirs.

    Captum enlarges by nearest neighbour unless told otherwise.
    """
    guided = _guided_backprop(evidences)
    maps = [positive_part(grad_cam(evidence).sum(dim=1, keepdim=True)) for evidence in evidences]
    return guided * torch.stack([enlarge(values, guided.shape[2:]) for values in maps]).mean(dim=0)


_NO_LIBRARY = frozenset({Profile.PYTORCH_GRAD_CAM, Profile.TORCHCAM})

INPUT_SPACE: tuple[Method, ...] = (
    Method(
        slug="vanilla-backprop",
        title="Vanilla backpropagation",
        paper="Simonyan et al., Deep Inside Convolutional Networks, arXiv:1312.6034: dy/dx",
        reads=Reads.INPUT,
        needs=frozenset({Need.GRADIENT}),
        family=Family.INPUT_SPACE,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient through the whole model",
        arithmetic=Whole(_vanilla_backprop, has_channels=True),
        absent_from=_NO_LIBRARY,
    ),
    Method(
        slug="gradient-times-input",
        title="Gradient times input",
        paper="Shrikumar et al., Not Just a Black Box, arXiv:1605.01713: x dy/dx",
        reads=Reads.INPUT,
        needs=frozenset({Need.GRADIENT}),
        family=Family.INPUT_SPACE,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient through the whole model",
        arithmetic=Whole(_gradient_times_input, has_channels=True),
        absent_from=_NO_LIBRARY,
    ),
    Method(
        slug="guided-backprop",
        title="Guided backpropagation",
        paper="Springenberg et al., Striving for Simplicity, arXiv:1412.6806: dy/dx with ReLUs gated by input and gradient",
        reads=Reads.INPUT,
        needs=frozenset({Need.GUIDED_GRADIENT}),
        family=Family.INPUT_SPACE,
        work=WorkClass.ONE_GRADIENT,
        cost="one guided gradient through the whole model",
        arithmetic=Whole(_guided_backprop, has_channels=True),
        absent_from=frozenset({Profile.TORCHCAM}),
    ),
    Method(
        slug="deconvnet",
        title="Deconvnet",
        paper="Zeiler and Fergus, Visualizing and Understanding CNNs, arXiv:1311.2901: dy/dx with ReLUs gated by gradient",
        reads=Reads.INPUT,
        needs=frozenset({Need.DECONVNET_GRADIENT}),
        family=Family.INPUT_SPACE,
        work=WorkClass.ONE_GRADIENT,
        cost="one guided gradient through the whole model",
        arithmetic=Whole(_deconvnet, has_channels=True),
        absent_from=_NO_LIBRARY,
    ),
    Method(
        slug="guided-grad-cam",
        title="Guided Grad-CAM",
        paper="Selvaraju et al., Grad-CAM, arXiv:1610.02391: guided backpropagation times Grad-CAM, enlarged",
        needs=frozenset({Need.GRADIENT, Need.GUIDED_GRADIENT}),
        family=Family.INPUT_SPACE,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient and one guided gradient through the whole model",
        arithmetic=Whole(_guided_grad_cam, has_channels=True),
        absent_from=_NO_LIBRARY,
    ),
)

"""What captum 0.9.0 answers: attributions as they are, signed and at the layer's or the input's resolution; nothing is scaled."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from captum import attr as library
from contract.conformance.networks import Question
from torch import Tensor

Array = npt.NDArray[Any]


def attribution(kind: Callable[..., Any], question: Question, **call: Any) -> Array:
    """(3 h w) of a method about the input."""
    return _answer(kind(copy.deepcopy(question.net)), question, **call)


def at_layer(kind: Callable[..., Any], question: Question, **call: Any) -> Array:
    """(c h w) of a method about a layer, or about the input through one."""
    net = copy.deepcopy(question.net)
    return _answer(kind(net, net.get_submodule(question.layers[0])), question, **call)


def _answer(method: Any, question: Question, **call: Any) -> Array:
    with warnings.catch_warnings():
        # It says that it sets hooks on ReLUs, that it turns on requires_grad, and what its next version will change.
        warnings.simplefilter("ignore")
        answer: Tensor = method.attribute(question.image.clone(), target=question.class_index, **call)
    return np.asarray(answer[0].detach())


def hirescam(question: Question) -> Array:
    """Layer gradient times activation, summed over channels."""
    return np.asarray(at_layer(library.LayerGradientXActivation, question).sum(axis=0))


def ablation(question: Question) -> Array:
    """The drop of the score without each channel (c), from ablation of a layer's output."""
    net = copy.deepcopy(question.net)
    kept: list[Tensor] = []
    handle = net.get_submodule(question.layers[0]).register_forward_hook(lambda _m, _i, out: kept.append(out.detach()))
    net(question.image)
    handle.remove()
    channels = torch.arange(kept[0].shape[1])[None, :, None, None].expand_as(kept[0])
    drops = at_layer(library.LayerFeatureAblation, question, layer_baselines=0, layer_mask=channels)
    return np.asarray(drops[:, 0, 0])


def ablation_map(question: Question) -> Array:
    """Those drops over |y|, times the channels: captum leaves the last step to its users."""
    kept: list[Tensor] = []
    net = copy.deepcopy(question.net)
    net.get_submodule(question.layers[0]).register_forward_hook(lambda _m, _i, out: kept.append(out.detach().clone()))
    score = net(question.image)[0, question.class_index].detach()
    return np.einsum("k,kij->ij", ablation(question) / float(score.abs()), kept[0][0].numpy())


def smoothgrad(question: Question, deviation: float, samples: int) -> Array:
    """NoiseTunnel over gradients, noise from the global generator at seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return attribution(_tunnel, question, nt_type="smoothgrad", nt_samples=samples, stdevs=deviation, abs=False)


def _tunnel(net: torch.nn.Module) -> library.NoiseTunnel:
    return library.NoiseTunnel(library.Saliency(net))


RAW: Mapping[str, Callable[[Question], Array]] = {
    "grad-cam": lambda question: at_layer(library.LayerGradCam, question)[0],
    "hirescam": hirescam,
    "vanilla-backprop": functools.partial(attribution, library.Saliency, abs=False),
    "gradient-times-input": functools.partial(attribution, library.InputXGradient),
    "guided-backprop": functools.partial(attribution, library.GuidedBackprop),
    "deconvnet": functools.partial(attribution, library.Deconvolution),
    "guided-grad-cam": functools.partial(at_layer, library.GuidedGradCam, interpolate_mode="bilinear"),
}

"""What torchcam 0.5.0 answers: maps at the layer's resolution after its ReLU (none for CAM), not normalised."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from contract.conformance.networks import Question
from torchcam import methods as library

Array = npt.NDArray[Any]


def maps(kind: Callable[..., Any], question: Question, *, normalized: bool = False, **keywords: Any) -> list[Array]:
    """One map (h w) for each layer."""
    net = copy.deepcopy(question.net)
    # Without a gradient at the input, nothing before the first parameter would be connected.
    image = question.image.clone().requires_grad_()
    with kind(net, list(question.layers), **keywords) as extractor:
        scores = net(image)
        answer = extractor(question.class_index, scores, normalized=normalized)
    return [np.asarray(cam[0].detach()) for cam in answer]


def raw(kind: Callable[..., Any], question: Question, **keywords: Any) -> Array:
    """The map of the only layer."""
    return maps(kind, question, **keywords)[0]


def cam(question: Question) -> Array:
    """CAM with the weights of the last linear layer, or of the last convolution where there is none."""
    modules = dict(question.net.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    convolutions = [name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d)]
    return raw(library.CAM, question, fc_layer=(linear or convolutions)[-1])


def fused(question: Question) -> Array:
    """LayerCAM of several layers, fused: tanh of maps that are already in [0, 1], and the largest at each place."""
    cams = [torch.from_numpy(values)[None] for values in maps(library.LayerCAM, question, normalized=True)]
    return np.asarray(library.LayerCAM.fuse_cams(cams)[0])


def smooth(question: Question, deviation: float, samples: int = 4) -> Array:
    """Smooth Grad-CAM++ with noise from the global generator at seed 0; its hook leaves the last noisy sample's activation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return raw(library.SmoothGradCAMpp, question, std=deviation, num_samples=samples)


def noisy(question: Question, deviation: float, samples: int) -> Array:
    """SS-CAM with noise from the global generator at seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return raw(library.SSCAM, question, std=deviation, num_samples=samples)


RAW: Mapping[str, Callable[[Question], Array]] = {
    "cam": cam,
    "grad-cam": functools.partial(raw, library.GradCAM),
    "grad-cam++": functools.partial(raw, library.GradCAMpp),
    "xgrad-cam": functools.partial(raw, library.XGradCAM),
    "layercam": functools.partial(raw, library.LayerCAM),
    "score-cam": functools.partial(raw, library.ScoreCAM),
    "is-cam": functools.partial(raw, library.ISCAM),
    "finer-cam": functools.partial(raw, library.FinerCAM),
    "legrad": functools.partial(raw, library.LeGrad),
    "refine-cam": functools.partial(raw, library.RefineCAM),
}


def legrad_of_the_models_score(question: Question) -> Array:
    """LeGrad with what lies behind each layer as that layer's projection, so that every layer's score is the model's own."""
    names = [name for name, _ in question.net.named_modules() if name.rpartition(".")[0] == "encoder.layers"]
    layers = []
    for index in range(len(names)):

        def projected(tokens: torch.Tensor, index: int = index) -> torch.Tensor:
            for name in names[index + 1 :]:
                tokens = question.net.get_submodule(name)(tokens)
            encoder: Any = question.net.get_submodule("encoder")
            return question.net.get_submodule("heads")(encoder.ln(tokens)[:, 0])

        net = copy.deepcopy(question.net)
        with library.LeGrad(net, names[index], score_projection=projected) as extractor:
            net(question.image)
            layers.append(extractor(question.class_index, normalized=False)[0][0].detach().numpy())
    return np.mean(layers, axis=0)

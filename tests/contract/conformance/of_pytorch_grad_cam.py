"""What pytorch-grad-cam 1.5.7 answers.

Maps are taken where `get_cam_image` returns them: raw and signed, at the layer's resolution, before its ReLU, two min-max
scalings and OpenCV. What the library has as a whole only (FullGrad, RefineCAM, SESS, smoothing by augmentation) comes finished.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_grad_cam as library
from contract.conformance.networks import Question
from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff
from pytorch_grad_cam.utils.model_targets import (
    ClassifierOutputReST,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
    FinerWeightedTarget,
)

Array = npt.NDArray[Any]
SOFTMAX, REST = ClassifierOutputSoftmaxTarget, ClassifierOutputReST


def raw(kind: Callable[..., Any], question: Question, target: Callable[..., Any] | None = None, **call: Any) -> Array:
    """The map (h w) of one layer before any post-processing."""
    net = copy.deepcopy(question.net)
    extractor = kind(net, [net.get_submodule(name) for name in question.layers])
    kept: list[Array] = []
    make = extractor.get_cam_image

    def keep(*arguments: Any, **keywords: Any) -> Array:
        kept.append(make(*arguments, **keywords))
        return kept[-1]

    extractor.get_cam_image = keep
    extractor(question.image.clone(), [target or ClassifierOutputTarget(question.class_index)], **call)
    # Its release detaches gradients in place, which raises where they are views.
    extractor.activations_and_grads.gradients = []
    extractor.activations_and_grads.release()
    return np.asarray(kept[0][0])


def of_score(kind: Callable[..., Any], target: Callable[[int], Any], question: Question) -> Array:
    """The map of another number of the class than its logit."""
    return raw(kind, question, target(question.class_index))


def finished(
    kind: Callable[..., Any], question: Question, keywords: Mapping[str, Any] = MappingProxyType({}), **call: Any
) -> Array:
    """The library's own answer (h w) of the input, in [0, 1]."""
    net = copy.deepcopy(question.net)
    extractor = kind(net, [net.get_submodule(name) for name in question.layers], **keywords)
    image = question.image.clone()
    answer = np.asarray(extractor(image, [ClassifierOutputTarget(question.class_index)], **call)[0])
    for part in getattr(extractor, "base_cam_per_layer", [getattr(extractor, "base_cam", extractor)]):
        part.activations_and_grads.release()
    return answer


def finer(question: Question) -> Array:
    """Finer-CAM of a class against its three nearest; the target is built as the library builds it for the predicted class."""
    logits = question.net(question.image)[0].detach()
    near = (logits - logits[question.class_index]).abs().argsort().tolist()
    others = [index for index in near if index != question.class_index][:3]
    return raw(library.GradCAM, question, FinerWeightedTarget(question.class_index, others, 1))


def guided_backprop(question: Question) -> Array:
    """The input's gradient (3 h w) with every ReLU *module* guided."""
    model = library.GuidedBackpropReLUModel(model=copy.deepcopy(question.net), device="cpu")
    return np.asarray(model(question.image.clone(), target_category=question.class_index)).transpose(2, 0, 1)


def concepts(question: Question, count: int) -> tuple[Array, Array]:
    """Deep feature factorisation before scaling: concepts (channels count) and their maps (count h w)."""
    net, kept = copy.deepcopy(question.net), []
    net.get_submodule(question.layers[0]).register_forward_hook(lambda _m, _i, out: kept.append(out.detach().clone()))
    net(question.image)
    with warnings.catch_warnings():
        # scikit-learn says that 200 iterations were not enough, which nobody can change from outside.
        warnings.simplefilter("ignore")
        found, maps = dff(kept[0].numpy(), n_components=count)
    return np.asarray(found), np.asarray(maps[0])


RAW: Mapping[str, Callable[[Question], Array]] = {
    "grad-cam": functools.partial(raw, library.GradCAM),
    "hirescam": functools.partial(raw, library.HiResCAM),
    "grad-cam-elementwise": functools.partial(raw, library.GradCAMElementWise),
    "grad-cam++": functools.partial(raw, library.GradCAMPlusPlus),
    "xgrad-cam": functools.partial(raw, library.XGradCAM),
    "layercam": functools.partial(raw, library.LayerCAM),
    "eigen-cam": functools.partial(raw, library.EigenCAM),
    "eigen-grad-cam": functools.partial(raw, library.EigenGradCAM),
    "kpca-cam": functools.partial(raw, library.KPCA_CAM),
    "seg-eigen-cam": functools.partial(raw, library.SegEigenCAM),
    "fem": functools.partial(raw, library.FEM),
    "shapley-cam": functools.partial(raw, library.ShapleyCAM),
    "score-cam": functools.partial(raw, library.ScoreCAM),
    "ablation-cam": functools.partial(raw, library.AblationCAM),
    "random-cam": functools.partial(raw, library.RandomCAM),
    "finer-cam": finer,
    "guided-backprop": guided_backprop,
}

FINISHED: Mapping[str, Callable[[Question], Array]] = {
    "fullgrad": functools.partial(finished, library.FullGrad),
    "refine-cam": functools.partial(finished, library.RefineCAM),
    "sess": functools.partial(finished, library.SESS),
    "grad-cam": functools.partial(finished, library.GradCAM),
    "layercam": functools.partial(finished, library.LayerCAM),
    "grad-cam++": functools.partial(finished, library.GradCAMPlusPlus),
}

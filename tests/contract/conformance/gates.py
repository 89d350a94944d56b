"""How near our served maps must come to a library's, and why: one `Comparison` for each method of each library.

A gate is `relative` unless its comparison says otherwise: the largest difference anywhere, as a share of the reference's largest
magnitude. Libraries are read raw, before their scaling; a comparison that cannot be raw brings ours to what the library shows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import captum.attr
import numpy as np
import numpy.typing as npt
import pytorch_grad_cam
import torch
import torchcam.methods
from contract.conformance import of_captum, of_pytorch_grad_cam, of_torchcam
from contract.conformance.networks import (
    CASES,
    FLATTENED,
    LOUD,
    POOLED,
    POOLED_MIDDLE,
    RESIDUAL,
    SEVERAL,
    Case,
    Question,
)
from contract.conformance.served import Asked

Array = npt.NDArray[Any]
Measure = Callable[[Array, Array], float]

# Two orders of summing float32.
EXACT = 1e-5


def relative(expected: Array, got: Array) -> float:
    """Largest difference as a share of the largest magnitude expected; of a reference that is zero, the largest value."""
    if expected.shape != got.shape:
        raise AssertionError(f"a map of {got.shape} cannot be held against one of {expected.shape}")
    # A NaN anywhere must not pass: maxima of it are NaN, which no bound admits.
    largest = float(np.abs(expected.astype(np.float64)).max())
    return float(np.abs(expected.astype(np.float64) - got).max()) / (largest or 1.0)


def up_to_sign(expected: Array, got: Array) -> float:
    """`relative` of whichever sign is nearer."""
    return min(relative(expected, got), relative(expected, -got))


def decorrelation(expected: Array, got: Array) -> float:
    """1 - r."""
    return 1 - float(np.corrcoef(expected.ravel(), got.ravel())[0, 1])


def decorrelation_up_to_sign(expected: Array, got: Array) -> float:
    """1 - |r|; a constant map, such as a saturated kernel's zeros, has no r and is compared as it is."""
    if not np.ptp(expected) or not np.ptp(got):
        return up_to_sign(expected, got)
    return min(decorrelation(expected, got), decorrelation(expected, -got))


def scaled(values: Array) -> Array:
    """Min-max as pytorch-grad-cam does it."""
    values = values - values.min()
    return np.asarray(values / (1e-7 + values.max()))


def enlarged(values: Array, side: int) -> Array:
    """Bilinear, half-pixel centres, as OpenCV."""
    planes = torch.tensor(values, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(planes, (side, side), mode="bilinear", align_corners=False)[0, 0].numpy()


def as_pytorch_grad_cam_shows(values: Array, side: int) -> Array:
    """ReLU, min-max, enlarged to the input, and min-max again."""
    return scaled(enlarged(scaled(np.maximum(values, 0)), side))


def unchanged(values: Array, _side: int) -> Array:
    """Raw against raw."""
    return values


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """One method of one library, and how ours is asked.

    Attributes:
        library: its name on PyPI.
        asked: of our server.
        answer: the library's.
        limit: of the measure.
        reason: for that limit, and for what is compared.
        measure: of the library's answer and ours.
        shown: brings ours to what the library shows, given the input's side.
        cases: networks and layers.
        note: what is special about it, after the method's name.
    """

    library: str
    asked: Asked
    answer: Callable[[Question], Array]
    limit: float = EXACT
    reason: str = "the same sums in another order"
    measure: Measure = relative
    shown: Callable[[Array, int], Array] = unchanged
    cases: tuple[Case, ...] = CASES
    note: str = ""

    def __str__(self) -> str:
        return f"{self.library} {self.method}"

    @property
    def method(self) -> str:
        """Its name in tables."""
        return f"{self.asked.method} {self.note}".strip()


def _pytorch_grad_cam(method: str, **changes: Any) -> Comparison:
    """Raw and signed."""
    asked = changes.pop("asked", {"spec": {"rectify": False}})
    return Comparison(
        library="grad-cam",
        asked=Asked(method=method, profile="pytorch-grad-cam", **asked),
        answer=changes.pop("answer", of_pytorch_grad_cam.RAW.get(method)),
        **changes,
    )


def _torchcam(method: str, **changes: Any) -> Comparison:
    """After the ReLU that both have."""
    return Comparison(
        library="torchcam",
        asked=Asked(method=method, profile="torchcam", **changes.pop("asked", {})),
        answer=changes.pop("answer", of_torchcam.RAW.get(method)),
        **changes,
    )


def _captum(method: str, **changes: Any) -> Comparison:
    """Raw and signed; captum has no profile of ours."""
    return Comparison(
        library="captum",
        asked=Asked(method=method, **changes.pop("asked", {"has_layers": False})),
        answer=changes.pop("answer", of_captum.RAW.get(method)),
        **changes,
    )


_SIGN = "a component's sign is arbitrary there; ours is always the same"
_SIGNED: Mapping[str, Any] = MappingProxyType({"spec": {"rectify": False}})
_UNAIMED: Mapping[str, Any] = MappingProxyType({"spec": {"rectify": False}, "has_target": False})
_RAW = of_pytorch_grad_cam.raw
_LIB = pytorch_grad_cam

PYTORCH_GRAD_CAM = (
    *(
        _pytorch_grad_cam(method)
        for method in ("grad-cam", "hirescam", "grad-cam-elementwise", "grad-cam++", "xgrad-cam", "layercam")
    ),
    _pytorch_grad_cam("eigen-cam", asked=_UNAIMED, measure=up_to_sign, reason=_SIGN),
    _pytorch_grad_cam("eigen-grad-cam", measure=up_to_sign, reason=_SIGN),
    _pytorch_grad_cam(
        "kpca-cam",
        asked=_UNAIMED,
        measure=decorrelation_up_to_sign,
        limit=1e-4,
        reason=f"{_SIGN}; its kernel is float32, ours float64",
        note="1 - r",
    ),
    _pytorch_grad_cam("seg-eigen-cam", reason="both set the sign by the larger end"),
    _pytorch_grad_cam("fem", asked=_UNAIMED, reason="under its profile: channels weighed by a share of cells"),
    _pytorch_grad_cam("shapley-cam"),
    *(
        _pytorch_grad_cam(
            "shapley-cam",
            asked={"spec": {"rectify": False, "score": score}},
            answer=functools.partial(of_pytorch_grad_cam.of_score, _LIB.ShapleyCAM, kind),
            limit=1e-4,
            reason="the curvature of a probability, in float32",
            note=f"of {score}",
        )
        for score, kind in (("softmax", of_pytorch_grad_cam.SOFTMAX), ("rest", of_pytorch_grad_cam.REST))
    ),
    _pytorch_grad_cam("finer-cam", reason="under its profile: weighed by probabilities that are differentiated too"),
    _pytorch_grad_cam("score-cam", limit=1e-4, reason="a softmax over channels of float32 scores"),
    _pytorch_grad_cam(
        "ablation-cam",
        cases=(POOLED, FLATTENED, RESIDUAL),
        limit=1e-4,
        reason="differences of float32 scores",
    ),
    *(
        _pytorch_grad_cam(
            method,
            asked={"spec": {"rectify": False}, "smoothing": {"eigen": True}},
            answer=functools.partial(_RAW, kind, eigen_smooth=True),
            measure=up_to_sign,
            reason=_SIGN,
            note="eigen-smoothed",
        )
        for method, kind in (("grad-cam", _LIB.GradCAM), ("layercam", _LIB.LayerCAM), ("hirescam", _LIB.HiResCAM))
    ),
    *(
        _pytorch_grad_cam(
            method,
            asked={"smoothing": {"augmentation": True}},
            answer=functools.partial(of_pytorch_grad_cam.finished, kind, aug_smooth=True),
            shown=enlarged,
            limit=1e-4,
            reason="a mean of maps in [0, 1], each divided by its maximum plus 1e-7",
            note="augmented",
        )
        for method, kind in (("grad-cam", _LIB.GradCAM), ("layercam", _LIB.LayerCAM))
    ),
    *(
        _pytorch_grad_cam(
            method,
            answer=of_pytorch_grad_cam.FINISHED[method],
            shown=as_pytorch_grad_cam_shows,
            reason="what it shows: ReLU, min-max, enlarged, min-max",
            note="finished",
        )
        for method in ("grad-cam", "grad-cam++", "layercam")
    ),
    _pytorch_grad_cam(
        "fullgrad",
        asked={"has_layers": False},
        answer=of_pytorch_grad_cam.FINISHED["fullgrad"],
        shown=lambda values, _side: scaled(values),
        cases=(POOLED, FLATTENED, RESIDUAL, LOUD),
    ),
    _pytorch_grad_cam(
        "sess",
        asked={},
        answer=functools.partial(
            of_pytorch_grad_cam.finished, _LIB.SESS, keywords=MappingProxyType({"use_softmax_scores": False})
        ),
        measure=decorrelation,
        limit=1e-4,
        reason="told to weigh by the target's score; it counts cells above 0, and rounding decides which those are",
        note="1 - r",
    ),
    _pytorch_grad_cam(
        "refine-cam",
        asked={},
        answer=of_pytorch_grad_cam.FINISHED["refine-cam"],
        shown=lambda values, side: scaled(enlarged(values, side)),
        cases=(SEVERAL,),
        measure=decorrelation,
        limit=0.02,
        reason="it multiplies maps of the input's size, ours are of the finest layer's",
        note="1 - r",
    ),
    _pytorch_grad_cam("guided-backprop", asked={"has_layers": False}, cases=(POOLED, FLATTENED)),
)

TORCHCAM = (
    _torchcam("cam", cases=(POOLED,)),
    _torchcam("grad-cam"),
    _torchcam("grad-cam++", reason="under its profile: the sum of ReLU(g)^3"),
    _torchcam("xgrad-cam"),
    _torchcam("layercam"),
    _torchcam("score-cam", limit=1e-4, reason="a softmax over channels of float32 scores"),
    _torchcam("is-cam", limit=1e-4, reason="under its profile: coefficients that accumulate to 5.5"),
    _torchcam(
        "ss-cam",
        asked={"parameters": {"samples": 3, "noise": 0.5, "seed": 0}},
        answer=functools.partial(of_torchcam.noisy, deviation=0.5, samples=3),
        limit=1e-4,
        reason="the same noise from the same seed",
    ),
    _torchcam(
        "smooth-grad-cam++",
        asked={"parameters": {"samples": 4, "noise": 0.3, "seed": 0}},
        answer=functools.partial(of_torchcam.smooth, deviation=0.3),
        limit=1e-4,
        reason="under its profile, which shows the last noisy copy's activation; the same noise from the same seed",
    ),
    _torchcam("finer-cam"),
    _torchcam(
        "refine-cam",
        answer=functools.partial(of_torchcam.raw, torchcam.methods.RefineCAM),
        cases=(SEVERAL,),
        limit=1e-4,
        reason="products of maps in [0, 1], each divided by its maximum plus 1e-8",
    ),
    _torchcam(
        "layercam",
        asked={"spec": {"fusion": "layercam"}},
        answer=of_torchcam.fused,
        cases=(SEVERAL,),
        limit=1e-4,
        reason="under its profile: tanh of every layer",
        note="fused",
    ),
)

CAPTUM = (
    _captum("grad-cam", asked=_SIGNED),
    _captum("hirescam", asked=_SIGNED, reason="layer gradient times activation, summed over channels"),
    _captum("vanilla-backprop", cases=(POOLED, FLATTENED, RESIDUAL)),
    _captum("gradient-times-input", cases=(POOLED, FLATTENED, RESIDUAL)),
    _captum("guided-backprop", cases=(POOLED, FLATTENED)),
    _captum("deconvnet", cases=(POOLED, FLATTENED)),
    _captum("guided-grad-cam", asked={}, cases=(POOLED, POOLED_MIDDLE, FLATTENED), reason="told to enlarge bilinearly"),
    _captum(
        "integrated-gradients",
        answer=functools.partial(of_captum.attribution, captum.attr.IntegratedGradients),
        cases=(POOLED, FLATTENED, RESIDUAL),
        reason="the same 50 nodes of the Gauss-Legendre rule",
    ),
    _captum(
        "smoothgrad",
        asked={"has_layers": False, "parameters": {"samples": 5, "noise": 0.1, "seed": 0}},
        answer=lambda question: of_captum.smoothgrad(
            question, 0.1 * float(question.image.max() - question.image.min()), 5
        ),
        cases=(POOLED, FLATTENED, RESIDUAL),
        reason="the same noise from the same seed",
    ),
    *(
        _captum(
            "occlusion",
            asked={"has_layers": False, "parameters": {"window": window, "stride": stride}},
            answer=lambda question, window=window, stride=stride: of_captum.attribution(
                captum.attr.Occlusion,
                question,
                sliding_window_shapes=(3, window, window),
                strides=(3, stride, stride),
                baselines=0,
            )[0],
            cases=(POOLED, FLATTENED, RESIDUAL),
            limit=1e-4,
            reason="differences of float32 scores",
            note=f"{window}/{stride}",
        )
        for window, stride in ((16, 8), (13, 5))
    ),
    _captum(
        "ablation-cam",
        asked=_SIGNED,
        answer=of_captum.ablation_map,
        limit=1e-4,
        reason="differences of float32 scores; captum gives the drops, divided by |y| here",
    ),
)

COMPARISONS = (*PYTORCH_GRAD_CAM, *TORCHCAM, *CAPTUM)

"""What a caller asks to be explained: `Spec("layercam", layers=["layer2"], target=3)` and its wire form.

Users write `Spec`s, or plain method names; `requests.py` turns them into `camserve.v1.Spec` messages. Words are checked here,
before anything is sent; whether a layer or a class exists only the server can say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from camserve.client import words
from camserve.client.targets import Target, target_to_proto
from camserve.v1 import spec_pb2

_PARAMETERS: Final = (
    "channels", "samples", "steps", "noise", "window", "stride", "concepts", "similar_classes", "contrast", "seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """One requested explanation; None leaves a choice to the server.

    Attributes:
        method: such as "grad-cam", "grad-cam++", "layercam", "eigen-cam", "rise"; the model card lists those that work.
        layers: names from the model card; none means the card's default, several are fused into one map.
        target: None for the predicted class, an int for a class index, a str for a class label, or a wrapper of `targets`.
        score: the number of the class that is differentiated: "logit" (the default), "softmax" or "rest".
        polarity: evidence "for" (the default) or "against" the target.
        profile: whose conventions to follow: "paper" (the default), "pytorch-grad-cam" or "torchcam".
        fusion: how several layers become one map: "mean" (the default), "max", "product" or "layercam".
        rectify: whether to keep positive evidence only; None does as the method's paper does.
        normalisation: "none" (the default) or "min-max".
        size: "layer" (the default), "input" or "source".
        encoding: "uint8" (the default), "float32", "float16", "png8", "png16", "overlay-png", "overlay-jpeg", "overlay-webp".
        overlay_opacity: weight of the colours in an overlay, 0 to 1; None means 0.5.
        saliency: how the channels of a map in input space are sent: "colour" (the default: apart and signed), "gray",
            "positive" or "negative".
        output_path: path into the outputs of models that return a tuple or a dict; None means the card's.
        region_threshold: asks for boxes around the cells that reach this share of the map's largest value, above 0, at most 1.
        max_regions: at most so many of them, the strongest; None means all.
        augmentation_smooth: takes the mean over flips and scalings of the input; six passes for one.
        eigen_smooth: takes the first principal component of the weighted activations in place of their sum.
        channels: most channels to score. This and all below tune the method; None takes its default, and the server refuses
            what the method does not read.
        samples: noisy copies, or random masks.
        steps: of an integral.
        noise: standard deviation, as a share of the input's range.
        window: side of an occluding patch or a pooling window.
        stride: step from one patch to the next.
        concepts: how many concept maps.
        similar_classes: how many of the nearest classes Finer-CAM compares with.
        contrast: weight of those classes.
        seed: of every random choice; None means 0.
        allow_partial: whether to send the best map so far, flagged, when the deadline comes.

    Raises:
        ValueError: when a word is unknown, and the text lists those that are allowed; or a number cannot be.
    """

    method: str
    layers: Sequence[str] = dataclasses.field(default=(), kw_only=True)
    target: Target = dataclasses.field(default=None, kw_only=True)
    score: str | None = dataclasses.field(default=None, kw_only=True)
    polarity: str | None = dataclasses.field(default=None, kw_only=True)
    profile: str | None = dataclasses.field(default=None, kw_only=True)
    fusion: str | None = dataclasses.field(default=None, kw_only=True)
    rectify: bool | None = dataclasses.field(default=None, kw_only=True)
    normalisation: str | None = dataclasses.field(default=None, kw_only=True)
    size: str | None = dataclasses.field(default=None, kw_only=True)
    encoding: str | None = dataclasses.field(default=None, kw_only=True)
    overlay_opacity: float | None = dataclasses.field(default=None, kw_only=True)
    saliency: str | None = dataclasses.field(default=None, kw_only=True)
    output_path: str | None = dataclasses.field(default=None, kw_only=True)
    region_threshold: float | None = dataclasses.field(default=None, kw_only=True)
    max_regions: int | None = dataclasses.field(default=None, kw_only=True)
    augmentation_smooth: bool = dataclasses.field(default=False, kw_only=True)
    eigen_smooth: bool = dataclasses.field(default=False, kw_only=True)
    channels: int | None = dataclasses.field(default=None, kw_only=True)
    samples: int | None = dataclasses.field(default=None, kw_only=True)
    steps: int | None = dataclasses.field(default=None, kw_only=True)
    noise: float | None = dataclasses.field(default=None, kw_only=True)
    window: int | None = dataclasses.field(default=None, kw_only=True)
    stride: int | None = dataclasses.field(default=None, kw_only=True)
    concepts: int | None = dataclasses.field(default=None, kw_only=True)
    similar_classes: int | None = dataclasses.field(default=None, kw_only=True)
    contrast: float | None = dataclasses.field(default=None, kw_only=True)
    seed: int | None = dataclasses.field(default=None, kw_only=True)
    allow_partial: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            # A string is a sequence of letters, which is never what was meant.
            object.__setattr__(self, "layers", (self.layers,))
        else:
            object.__setattr__(self, "layers", tuple(self.layers))
        self.to_proto()  # Wrong words are told where they are written.

    def to_proto(self) -> spec_pb2.Spec:
        """Returns the message that asks for this explanation."""
        message = spec_pb2.Spec(
            method=words.METHODS.name(self.method),
            layers=self.layers,
            profile=_name(words.PROFILES, self.profile),
            fusion=_name(words.FUSIONS, self.fusion),
            normalisation=_name(words.NORMALISATIONS, self.normalisation),
            size=_name(words.SIZES, self.size),
            encoding=_name(words.ENCODINGS, self.encoding),
            target=spec_pb2.Target(
                score=_name(words.SCORES, self.score),
                polarity=_name(words.POLARITIES, self.polarity),
                output_path=self.output_path,
            ),
            rectify=self.rectify,
            saliency=_name(words.SALIENCIES, self.saliency),
        )
        message.target.MergeFrom(target_to_proto(self.target))
        self._tune(message)
        if self.overlay_opacity is not None:
            if not 0 <= self.overlay_opacity <= 1:
                raise ValueError(f"overlay_opacity is {self.overlay_opacity}; it must lie between 0 and 1")
            message.overlay_opacity = self.overlay_opacity
        return message

    def _tune(self, message: spec_pb2.Spec) -> None:
        """Puts in smoothing, regions and parameters; those left open stay unset, so that an older server need not know them."""
        if self.augmentation_smooth or self.eigen_smooth:
            message.smoothing.augmentation, message.smoothing.eigen = self.augmentation_smooth, self.eigen_smooth
        if self.region_threshold is not None:
            if not 0 < self.region_threshold <= 1:
                raise ValueError(f"region_threshold is {self.region_threshold}; it must lie above 0 and be at most 1")
            message.regions.threshold = self.region_threshold
        if self.max_regions is not None:
            if self.region_threshold is None or self.max_regions < 1:
                raise ValueError(f"max_regions is {self.max_regions}; it is at least 1 and needs a region_threshold")
            message.regions.max_regions = self.max_regions
        parameters = {name: getattr(self, name) for name in _PARAMETERS if getattr(self, name) is not None}
        if parameters or self.allow_partial:
            message.parameters.CopyFrom(spec_pb2.Parameters(**parameters, allow_partial=self.allow_partial))


AnySpec: TypeAlias = Spec | str | spec_pb2.Spec


def to_protos(specs: Iterable[AnySpec] | str | Spec) -> list[spec_pb2.Spec]:
    """Returns the messages of several specs.

    Args:
        specs: `Spec`s; method names; or `camserve.v1.spec_pb2.Spec` messages, for options that `Spec` does not spell out. One
            alone need not be put in a list.

    Raises:
        ValueError: for a word that does not exist.
        TypeError: for anything that is no spec.
    """
    if isinstance(specs, str | Spec | spec_pb2.Spec):
        specs = [specs]
    return [_to_proto(spec) for spec in specs]


def _to_proto(spec: AnySpec) -> spec_pb2.Spec:
    match spec:
        case spec_pb2.Spec():
            return spec
        case Spec():
            return spec.to_proto()
        case str():
            return Spec(spec).to_proto()
    raise TypeError(f"a spec is a Spec, a method name or a spec_pb2.Spec, not {type(spec).__name__}")


def _name(vocabulary: words.Vocabulary, word: str | None) -> str | None:
    return None if word is None else vocabulary.name(word)

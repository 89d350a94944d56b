"""What a caller asks to be explained: `Spec("layercam", layers=["layer2"], target=3)` and its wire form.

Users write `Spec`s, or plain method names; `requests.py` turns them into `camserve.v1.Spec` messages. Words are checked here,
before anything is sent; whether a layer or a class exists only the server can say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from camserve.client import words
from camserve.v1 import spec_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Kth:
    """Asks about the k-th best class; 1 is the predicted one."""

    k: int


@dataclasses.dataclass(frozen=True, slots=True)
class TopK:
    """Asks about the k best classes, one map each."""

    k: int


@dataclasses.dataclass(frozen=True, slots=True)
class Above:
    """Asks about every class whose probability is above a threshold (0 to 1), one map each."""

    probability: float


Target: TypeAlias = int | str | Kth | TopK | Above | None


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """One requested explanation; None leaves a choice to the server.

    Attributes:
        method: such as "grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "eigen-cam", "cam".
        layers: names from the model card; none means the card's default, several are fused into one map.
        target: None for the predicted class, an int for a class index, a str for a class label, or Kth, TopK, Above.
        score: the number of the class that is differentiated: "logit" (the default), "softmax" or "rest".
        polarity: evidence "for" (the default) or "against" the target.
        profile: whose conventions to follow: "paper" (the default), "pytorch-grad-cam" or "torchcam".
        fusion: how several layers become one map: "mean" (the default), "max", "product" or "layercam".
        rectify: whether to keep positive evidence only; None does as the method's paper does.
        normalisation: "none" (the default) or "min-max".
        size: "layer" (the default), "input" or "source".
        encoding: "uint8" (the default), "float32", "float16", "png8", "png16", "overlay-png", "overlay-jpeg", "overlay-webp".
        overlay_opacity: weight of the colours in an overlay, 0 to 1; None means 0.5.

    Raises:
        ValueError: when a word is unknown; the text lists those that are allowed.
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
                score=_name(words.SCORES, self.score), polarity=_name(words.POLARITIES, self.polarity)
            ),
        )
        message.target.MergeFrom(_target(self.target))
        if self.rectify is not None:
            message.rectify = self.rectify
        if self.overlay_opacity is not None:
            if not 0 <= self.overlay_opacity <= 1:
                raise ValueError(f"overlay_opacity is {self.overlay_opacity}; it must lie between 0 and 1")
            message.overlay_opacity = self.overlay_opacity
        return message


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


def _target(target: Target) -> spec_pb2.Target:
    match target:
        case None:
            return spec_pb2.Target(predicted=spec_pb2.PredictedClass())
        case bool():  # An int to Python, but nobody means class 1 by True.
            raise TypeError("target is a bool; give a class index, a label, Kth, TopK, Above or None")
        case int():
            return spec_pb2.Target(class_index=target)
        case str():
            return spec_pb2.Target(class_label=target)
        case Kth():
            return spec_pb2.Target(kth=spec_pb2.KthClass(k=target.k))
        case TopK():
            return spec_pb2.Target(top=spec_pb2.TopClasses(k=target.k))
        case Above():
            return spec_pb2.Target(above=spec_pb2.ClassesAbove(probability=target.probability))
    raise TypeError(f"target is a {type(target).__name__}; give a class index, a label, Kth, TopK, Above or None")


def _name(vocabulary: words.Vocabulary, word: str | None) -> str | None:
    return None if word is None else vocabulary.name(word)

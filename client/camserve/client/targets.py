"""What an explanation is about: the wrappers that a `Spec`'s target may be, and their wire form.

None asks about the predicted class, a number about a class index, a string about a class label; everything else has a wrapper
here, named for what is asked. `specs.py` turns them into messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from camserve.client.boxes import Box
from camserve.client.inputs import AnyInput, PreparedInput, prepare
from camserve.v1 import input_pb2, spec_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Kth:
    """Asks about the k-th best class; 1 is the predicted one."""

    k: int

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        return spec_pb2.Target(kth=spec_pb2.KthClass(k=self.k))


@dataclasses.dataclass(frozen=True, slots=True)
class TopK:
    """Asks about the k best classes, one map each."""

    k: int

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        return spec_pb2.Target(top=spec_pb2.TopClasses(k=self.k))


@dataclasses.dataclass(frozen=True, slots=True)
class Above:
    """Asks about every class whose probability is above a threshold (0 to 1), one map each."""

    probability: float

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        return spec_pb2.Target(above=spec_pb2.ClassesAbove(probability=self.probability))


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Asks why one class rather than another.

    Attributes:
        class_index: the class argued for.
        other_class_index: the class argued against.
        weight: of the other's score; None means 1.
    """

    class_index: int
    other_class_index: int
    weight: float | None = None

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        return spec_pb2.Target(
            difference=spec_pb2.Difference(
                class_index=self.class_index, other_class_index=self.other_class_index, weight=self.weight
            )
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Region:
    """Asks about a region of a segmentation: the sum of one class's scores over its cells.

    Attributes:
        box: the cells in a box; at most one of box, mask and point is given, and none means those predicted as the class.
        mask: those where an array (h, w) of the source's size is not 0.
        point: the one at (x, y), in source pixels.
        class_index: the class; None means the one that most of the chosen cells are predicted as.
    """

    box: Box | None = None
    mask: npt.ArrayLike | None = None
    point: tuple[float, float] | None = None
    class_index: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("box", "mask", "point") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a region has one of box, mask and point, not {' and '.join(given)}")

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        message = spec_pb2.SegmentationRegion(class_index=self.class_index)
        if self.box is not None:
            message.box.CopyFrom(self.box.to_proto())
        if self.point is not None:
            message.point.x_pixels, message.point.y_pixels = self.point
        if self.mask is not None:
            chosen = np.asarray(self.mask) != 0
            message.mask.CopyFrom(spec_pb2.Mask(shape=chosen.shape, data=chosen.astype(np.uint8).tobytes()))
        return spec_pb2.Target(region=message)


@dataclasses.dataclass(frozen=True, slots=True)
class DetectionBox:
    """Asks about the detection that overlaps a box most.

    Attributes:
        box: where the object is, in source pixels.
        class_index: the class it must have; None means any.
        min_iou: least intersection over union that counts as a match; None means 0.5.
    """

    box: Box
    class_index: int | None = None
    min_iou: float | None = None

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        return spec_pb2.Target(
            detection=spec_pb2.DetectionBox(box=self.box.to_proto(), class_index=self.class_index, min_iou=self.min_iou)
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Embedding:
    """Asks what makes the input similar to a vector of the model's dimensions."""

    vector: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", tuple(float(value) for value in self.vector))

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        vector = spec_pb2.Vector(values=self.vector)
        return spec_pb2.Target(embedding=spec_pb2.EmbeddingSimilarity(vector=vector))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Similar:
    """Asks what makes the input similar to another one, embedded by the same model.

    Attributes:
        image: the other: whatever can be explained, read here and once.
    """

    image: AnyInput
    _prepared: PreparedInput = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        prepared = prepare(self.image)
        if isinstance(prepared.message, input_pb2.RawFrame):
            # The contract compares with files and tensors only.
            prepared = prepare(Image.fromarray(np.asarray(self.image)))
        object.__setattr__(self, "_prepared", prepared)

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that carries the other input."""
        message = self._prepared.message
        other = spec_pb2.EmbeddingSimilarity()
        if isinstance(message, input_pb2.Tensor):
            other.tensor.CopyFrom(message)
        elif isinstance(message, input_pb2.EncodedImage):
            other.image.CopyFrom(message)
        return spec_pb2.Target(embedding=other)


@dataclasses.dataclass(frozen=True, slots=True)
class Phrase:
    """Asks what makes the input similar to a phrase of the model card."""

    text: str

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        return spec_pb2.Target(text=self.text)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Asks about the steps of a sequence, one map each.

    Attributes:
        classes: the class at each step from the first; none means the predicted ones.
        first: the first step, from 0.
        count: how many; None means all from there, or as many as classes are given.
    """

    classes: Sequence[int] = ()
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))

    def to_proto(self) -> spec_pb2.Target:
        """Returns the message that asks about it."""
        return spec_pb2.Target(
            steps=spec_pb2.SequenceSteps(class_indices=self.classes, first=self.first, count=self.count)
        )


_Wrapper: TypeAlias = Kth | TopK | Above | Difference | Region | DetectionBox | Embedding | Similar | Phrase | Steps
Target: TypeAlias = int | str | _Wrapper | None


def target_to_proto(target: Target) -> spec_pb2.Target:
    """Returns the message that asks about a target, without score and polarity.

    Raises:
        TypeError: for anything that is no target.
    """
    if target is None:
        return spec_pb2.Target(predicted=spec_pb2.PredictedClass())
    if isinstance(target, int) and not isinstance(target, bool):  # Nobody means class 1 by True.
        return spec_pb2.Target(class_index=target)
    if isinstance(target, str):
        return spec_pb2.Target(class_label=target)
    if isinstance(target, _Wrapper):
        return target.to_proto()
    raise TypeError(
        f"target is a {type(target).__name__}; give a class index, a label, None, or one of Kth, TopK, Above, Difference, "
        "Region, DetectionBox, Embedding, Similar, Phrase and Steps"
    )

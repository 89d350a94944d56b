"""What an explanation is about, before the prediction is known.

A target is written by the caller in terms of the source image and of classes. Once the input is decoded, `placement.py` turns
what lies on the source into the model's own pixels (`PlacedRegion`, `PlacedBox`) and reference images into tensors.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from camserve.server.jobs.inputs import BoolArray, Box, JobInput
from camserve.server.jobs.words import Polarity, Score

__all__ = [
    "About",
    "ClassIndex",
    "ClassesAbove",
    "DetectionBox",
    "Difference",
    "Embedding",
    "KthClass",
    "Mask",
    "Phrase",
    "PlacedBox",
    "PlacedRegion",
    "Point",
    "Predicted",
    "Reference",
    "ReferenceTensor",
    "Region",
    "Steps",
    "Target",
    "TopClasses",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Predicted:
    """The class the model predicts; of a segmentation the class of most cells, of a detector its best detection."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClassIndex:
    """One class; for regression one value."""

    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class KthClass:
    """The k-th best class, from 1."""

    k: int


@dataclasses.dataclass(frozen=True, slots=True)
class TopClasses:
    """The k best classes, one map each."""

    k: int


@dataclasses.dataclass(frozen=True, slots=True)
class ClassesAbove:
    """Every class whose probability is above a threshold (0 to 1), best first, one map each."""

    probability: float


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One class rather than another: the score of the first less `weight` times that of the second."""

    index: int
    other: int
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Embedding:
    """The cosine between the model's embedding and this vector."""

    vector: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """The cosine between the model's embedding of the input and that of another image."""

    payload: JobInput


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ReferenceTensor:
    """A `Reference` after decoding: (c h w), as the model takes it."""

    values: npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True, slots=True)
class Phrase:
    """The cosine between the model's embedding and that of a phrase, which the model's card holds."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One pixel of the source."""

    x: float
    y: float


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """Chosen pixels of the source, or cells of a tensor's grid.

    Attributes:
        shape: (h w) of the source; of a tensor its spatial axes.
        data: one byte for each in C order; any but 0 is chosen.
    """

    shape: tuple[int, ...]
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """Cells of a dense output: the sum of a class's scores over them (Seg-Grad-CAM, arXiv:2002.11434).

    Attributes:
        index: the class; None takes the one that most of the chosen cells are predicted as.
        pixels: where on the source; None takes the cells predicted as that class.
    """

    index: int | None = None
    pixels: Box | Mask | Point | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PlacedRegion:
    """A `Region` on the model's input: `cells` has the input's spatial shape; None as for `Region.pixels`."""

    index: int | None = None
    cells: BoolArray | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class DetectionBox:
    """The detection of the model's own that overlaps this box most: the target is its class score.

    Attributes:
        box: on the source.
        index: the class it must have, or None.
        min_iou: least intersection over union, above which a detection counts as found.
    """

    box: Box
    index: int | None = None
    min_iou: float = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedBox:
    """A `DetectionBox` in pixels of the model's input."""

    box: Box
    index: int | None = None
    min_iou: float = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a sequence, one map each.

    Attributes:
        classes: the class at each step from the first; empty takes the predicted ones.
        first: the first step explained, from 0.
        count: how many; None takes all from there, or as many as there are classes.
    """

    classes: tuple[int, ...] = ()
    first: int = 0
    count: int | None = None


About: TypeAlias = (
    Predicted
    | ClassIndex
    | KthClass
    | TopClasses
    | ClassesAbove
    | Difference
    | Embedding
    | Reference
    | ReferenceTensor
    | Phrase
    | Region
    | PlacedRegion
    | DetectionBox
    | PlacedBox
    | Steps
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The scalar a spec differentiates, before the prediction is known.

    Attributes:
        about: what of the output.
        score: which number of it.
        polarity: evidence for it, or against.
        output_path: where in the model's output; empty takes the card's.
    """

    about: About = Predicted()
    score: Score = Score.LOGIT
    polarity: Polarity = Polarity.FOR
    output_path: str = ""

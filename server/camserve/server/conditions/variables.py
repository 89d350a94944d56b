"""What a condition may ask: each variable's type, meaning, and how it is read off what a model said.

`condition.py` computes those that an expression looks at, and no other: a pass may have many rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np

from camserve.server.jobs import Circumstances, OutputKind, Reading

__all__ = ["VARIABLES", "Subject", "Variable"]

_LISTED: Final = 5


class Subject:
    """One row and its request, of which a variable is a view.

    Args:
        reading: what the model said; finite.
        circumstances: the request.
        class_labels: by class index; empty when the card has none.
    """

    def __init__(self, reading: Reading, circumstances: Circumstances, class_labels: Sequence[str]) -> None:
        self.reading = reading
        self.circumstances = circumstances
        self._labels = class_labels

    def label(self, index: int) -> str:
        """Of a class; empty where the card has none."""
        return self._labels[index] if 0 <= index < len(self._labels) else ""

    @functools.cached_property
    def first(self) -> tuple[int, float]:
        """Class and score that speak for the row: the predicted one; of a sequence those of its least sure step."""
        reading = self.reading
        match reading.kind:
            case OutputKind.DETECTION:
                found = reading.detections[:1]
                return (found[0].class_index, found[0].score) if found else (-1, 0.0)
            case OutputKind.EMBEDDING | OutputKind.REGRESSION:
                return -1, 0.0
            case OutputKind.SEQUENCE:
                step = self._least_sure_step()
                index = int(reading.scores[step].argmax())
                return index, float(reading.probabilities[step, index])
        index = reading.ranking(1)[0]
        return index, float(reading.probabilities[index])

    @functools.cached_property
    def second(self) -> float:
        """Score of the next best class of the same, 0 where there is none."""
        reading = self.reading
        match reading.kind:
            case OutputKind.DETECTION:
                return reading.detections[1].score if len(reading.detections) > 1 else 0.0
            case OutputKind.EMBEDDING | OutputKind.REGRESSION:
                return 0.0
            case OutputKind.SEQUENCE:
                step = self._least_sure_step()
                ranked = np.argsort(-reading.scores[step], kind="stable")
                return float(reading.probabilities[step, ranked[1]]) if len(ranked) > 1 else 0.0
        ranking = reading.ranking(2)
        return float(reading.probabilities[ranking[1]]) if len(ranking) > 1 else 0.0

    @property
    def top(self) -> list[str]:
        """Labels, best first, at most five; of a sequence those of all steps in order; of a detector those of all it found."""
        reading = self.reading
        match reading.kind:
            case OutputKind.DETECTION:
                return [self.label(found.class_index) for found in reading.detections]
            case OutputKind.EMBEDDING | OutputKind.REGRESSION:
                return []
            case OutputKind.SEQUENCE:
                return [self.label(int(index)) for index in reading.scores.argmax(axis=1)]
        return [self.label(index) for index in reading.ranking(_LISTED)]

    @property
    def scores(self) -> dict[str, float]:
        """Scores by label, or by index where the card has none; a detector's best of each class it found."""
        reading = self.reading
        if reading.kind is OutputKind.DETECTION:
            pairs = [(found.class_index, found.score) for found in reversed(reading.detections)]
        elif reading.probabilities.ndim == 1:
            pairs = list(enumerate(reading.probabilities.tolist()))
        else:
            pairs = []
        return {self.label(index) or str(index): score for index, score in pairs}

    @property
    def values(self) -> list[float]:
        """What the model returned, in order: logits, values, dimensions; none for a sequence or a detector."""
        return [float(value) for value in self.reading.scores.tolist()] if self.reading.scores.ndim == 1 else []

    def _least_sure_step(self) -> int:
        return int(self.reading.probabilities.max(axis=1).argmin())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One name.

    Attributes:
        kind: its type, in CEL's words.
        meaning: for people.
        read: off a subject.
    """

    kind: str
    meaning: str
    read: Callable[[Subject], object]


VARIABLES: Final[Mapping[str, Variable]] = MappingProxyType(
    {
        "label": Variable(
            kind="string",
            meaning="Label of the predicted class, of a detector's best detection, of the least sure step of a sequence; empty "
            "where there is none.",
            read=lambda subject: subject.label(subject.first[0]),
        ),
        "index": Variable(kind="int", meaning="Its index, or -1.", read=lambda subject: subject.first[0]),
        "score": Variable(
            kind="double",
            meaning="Its probability, as the prediction tells it; a detection's score; 0 for a regression or an embedding.",
            read=lambda subject: subject.first[1],
        ),
        "second": Variable(
            kind="double", meaning="Probability of the next best class, or 0.", read=lambda subject: subject.second
        ),
        "margin": Variable(
            kind="double",
            meaning="How far `score` is above `second`.",
            read=lambda subject: subject.first[1] - subject.second,
        ),
        "top": Variable(
            kind="list<string>",
            meaning="Labels of the five best classes, best first; of everything that was detected; of a sequence's steps.",
            read=lambda subject: subject.top,
        ),
        "scores": Variable(
            kind="map<string, double>",
            meaning="Probabilities by label, or by index, as text, where the card has no labels; a detector's best score of each "
            "class that it found.",
            read=lambda subject: subject.scores,
        ),
        "values": Variable(
            kind="list<double>",
            meaning="What the model returned, in order: logits, a regression's values, an embedding's dimensions.",
            read=lambda subject: subject.values,
        ),
        "count": Variable(
            kind="int",
            meaning="How many objects were detected.",
            read=lambda subject: len(subject.reading.detections),
        ),
        "model": Variable(
            kind="string", meaning="Name of the model.", read=lambda subject: subject.circumstances.model
        ),
        "version": Variable(kind="string", meaning="Its version.", read=lambda subject: subject.circumstances.version),
        "lane": Variable(
            kind="string",
            meaning='"interactive", "standard" or "bulk".',
            read=lambda subject: str(subject.circumstances.lane),
        ),
        "labels": Variable(
            kind="map<string, string>",
            meaning="The request's own labels.",
            read=lambda subject: dict(subject.circumstances.labels),
        ),
        "asked": Variable(
            kind="bool",
            meaning="Whether the caller asked for explanations.",
            read=lambda subject: subject.circumstances.asked,
        ),
    }
)

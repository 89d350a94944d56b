"""What a map turned out to be about: the class, region, detection, step or phrase that the server resolved a target to.

`heatmaps.py` reads one from each heatmap message; captions and records tell it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from camserve.client import words
from camserve.client.boxes import Detection
from camserve.v1 import heatmap_pb2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedTarget:
    """What a map turned out to be about.

    Attributes:
        class_index: index into the model's outputs; None when it is about no class.
        label: its label; empty when the model card has none.
        score: "logit", "softmax" or "rest": the number of the class that was differentiated.
        value: that number, before polarity.
        polarity: evidence "for" or "against".
        other_class_index: the class argued against, for a difference.
        step: the step of a sequence, from 0.
        cells: how many cells of a dense output were summed.
        detection: the detection that was matched.
        iou: how far it overlaps the box that was asked about.
        concept: which concept of a factorisation, from 0.
        phrase: the phrase asked about, or empty.
    """

    class_index: int | None
    label: str
    score: str
    value: float
    polarity: str = "for"
    other_class_index: int | None = None
    step: int | None = None
    cells: int | None = None
    detection: Detection | None = None
    iou: float | None = None
    concept: int | None = None
    phrase: str = ""

    @property
    def name(self) -> str:
        """The label, or the class index where there is none; else the phrase or the concept; empty when it has no name."""
        if self.class_index is not None:
            return self.label or str(self.class_index)
        return self.phrase or ("" if self.concept is None else f"concept {self.concept + 1}")

    @property
    def description(self) -> str:
        """What was asked, in a few words, such as "against scratch" or "scratch rather than 3, step 2"."""
        parts = [f"against {self.name}" if self.polarity == "against" else self.name]
        if self.other_class_index is not None:
            parts[0] += f" rather than {self.other_class_index}"
        if self.step is not None:
            parts.append(f"step {self.step + 1}")
        if self.cells is not None:
            parts.append(f"{self.cells} cells")
        if self.iou is not None:
            parts.append(f"IoU {self.iou:.2f}")
        return ", ".join(filter(None, parts)) or "no class"

    @classmethod
    def from_proto(cls, message: heatmap_pb2.ResolvedTarget) -> ResolvedTarget:
        """Returns the target a message holds."""

        def given(name: str) -> Any:
            return getattr(message, name) if message.HasField(name) else None

        return cls(
            class_index=given("class_index"),
            label=message.label,
            score=words.SCORES.word(message.score),
            value=message.value,
            polarity=words.POLARITIES.word(message.polarity) or "for",
            other_class_index=given("other_class_index"),
            step=given("step"),
            cells=given("cells"),
            detection=Detection.from_proto(message.detection) if message.HasField("detection") else None,
            iou=given("iou"),
            concept=given("concept"),
            phrase=message.phrase,
        )

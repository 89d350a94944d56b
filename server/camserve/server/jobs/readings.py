"""What a model said, before anybody labels it: made by the engine, read by the stages and by the conditions of rules."""

from __future__ import annotations

import dataclasses

import numpy as np

from camserve.server.jobs.inputs import Box, FloatArray
from camserve.server.jobs.words import OutputKind

__all__ = ["Detection", "Reading"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One object a detector found; the box in pixels of the model's input until `prediction.py` puts it on the source."""

    box: Box
    class_index: int
    score: float
    label: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """What the model said of one row, on the host, before anybody labels it.

    Attributes:
        kind: of output.
        scores: (classes) logits; (values); (dimensions) of an embedding; of a segmentation each class's mean logit over the
            input; (steps, classes) of a sequence; empty for a detector.
        probabilities: of the same shape: softmax or sigmoid; of a segmentation each class's share of the cells; empty where there
            are none.
        detections: best first, for a detector; boxes in pixels of the model's input.
    """

    kind: OutputKind
    scores: FloatArray
    probabilities: FloatArray
    detections: tuple[Detection, ...] = ()

    def ranking(self, count: int) -> list[int]:
        """Indices of the best classes, best first, ties by lower index: by logit, or by their share of a segmentation's cells.

        Args:
            count: how many at most.
        """
        ranked = self.probabilities if self.kind is OutputKind.SEGMENTATION else self.scores
        # The largest alone is found in a tenth of the time that sorting a thousand takes.
        order = [ranked.argmax()] if count == 1 else np.argsort(-ranked, kind="stable")[:count]
        return [int(index) for index in order]

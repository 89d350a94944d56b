"""What the model said of one row, labelled and put on the source: the prediction a caller sees; used by the pipeline."""

from __future__ import annotations

import dataclasses

from camserve.server.jobs import ClassScore, Geometry, OutputKind, Prediction, Reading
from camserve.server.models.card import ModelCard
from camserve.server.placement import box_on_source

__all__ = ["predict"]


def predict(reading: Reading, card: ModelCard, top_k: int, geometry: Geometry | None) -> Prediction:
    """Tells a reading in the caller's terms.

    Classes come best first, ties by lower index: by logit, or by their share of the cells of a segmentation. The values of a
    regression come all of them, in their own order and with probability 0; of a sequence the best class of each step.
    Detections come best first, with boxes on the source.

    Args:
        reading: finite.
        card: for the labels.
        top_k: how many classes or detections at most.
        geometry: how the input lies on the source; None for tensors, whose boxes stay as they are.
    """
    return dataclasses.replace(_told(reading, card, top_k, geometry), reading=reading)


def _told(reading: Reading, card: ModelCard, top_k: int, geometry: Geometry | None) -> Prediction:
    match reading.kind:
        case OutputKind.DETECTION:
            return Prediction(
                detections=tuple(
                    dataclasses.replace(
                        found, box=box_on_source(found.box, geometry), label=card.label(found.class_index)
                    )
                    for found in reading.detections[:top_k]
                )
            )
        case OutputKind.EMBEDDING:
            return Prediction(embedding=tuple(reading.scores.tolist()))
        case OutputKind.REGRESSION:
            return Prediction(classes=tuple(_entry(reading, card, (index,)) for index in range(len(reading.scores))))
        case OutputKind.SEQUENCE:
            best = enumerate(reading.scores.argmax(axis=1))
            return Prediction(classes=tuple(_entry(reading, card, (step, int(index))) for step, index in best))
        case _:
            return Prediction(classes=tuple(_entry(reading, card, (index,)) for index in reading.ranking(top_k)))


def _entry(reading: Reading, card: ModelCard, place: tuple[int, ...]) -> ClassScore:
    """One line, of a class or of a (step, class)."""
    *step, index = place
    return ClassScore(
        class_index=index,
        label=card.label(index),
        logit=float(reading.scores[place]),
        probability=float(reading.probabilities[place]) if reading.probabilities.size else 0.0,
        step=step[0] if step else None,
    )

from __future__ import annotations

import pytest

from camserve.client import Box, ClassScore, Detection, Prediction
from camserve.client.results import event_from_proto
from camserve.v1 import explanation_service_pb2, heatmap_pb2

BOX = {"left_pixels": 1, "top_pixels": 2, "width_pixels": 3, "height_pixels": 4}


def _read(**fields: object) -> Prediction:
    message = heatmap_pb2.Prediction(model="m", version="1", **fields)  # type: ignore[arg-type]
    event = event_from_proto(explanation_service_pb2.ExplainResponse(prediction=message), None)
    assert isinstance(event, Prediction)
    return event


def test_the_best_class_speaks_for_a_classifier() -> None:
    """Its label, or its index where there is none."""
    prediction = _read(classes=[{"class_index": 3, "logit": 1.5, "probability": 0.75}, {"class_index": 1}])

    assert ("", "3", 3, 0.75) == (
        prediction.label, prediction.name, prediction.class_index, prediction.probability,
    )  # fmt: skip
    assert ClassScore(class_index=3, label="", logit=1.5, probability=0.75, step=None) == prediction.best


def test_the_best_detection_speaks_for_a_detector() -> None:
    """With its score in place of a probability."""
    prediction = _read(detections=[{"box": BOX, "class_index": 3, "label": "crane", "score": 0.5}])

    assert ("crane", "crane", 3, 0.5) == (
        prediction.label, prediction.name, prediction.class_index, prediction.probability,
    )  # fmt: skip
    expected = Detection(box=Box(1, 2, 3, 4), class_index=3, label="crane", score=0.5)
    assert (expected,) == prediction.detections


@pytest.mark.parametrize(
    ("fields", "told"), [({"embedding": [0.5]}, "an embedding has no classes"), ({}, "nothing was")]
)
def test_where_nothing_is_best_nothing_is_made_up(fields: dict[str, object], told: str) -> None:
    """An embedding has no classes, and a detector may find nothing."""
    prediction = _read(**fields)

    assert (None, "", "") == (prediction.best, prediction.label, prediction.name)
    for name in ("class_index", "probability"):
        with pytest.raises(ValueError, match=told):
            getattr(prediction, name)


def test_the_steps_of_a_sequence_are_told() -> None:
    """Step 0 is a step."""
    prediction = _read(classes=[{"class_index": 3, "step": 0}, {"class_index": 1, "step": 1}])

    assert [0, 1] == [item.step for item in prediction.classes]

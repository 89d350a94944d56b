from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.cards import card

from camserve.server.engine.readouts import read
from camserve.server.jobs import Box, Geometry, OutputKind, Prediction, Reading
from camserve.server.prediction import predict


def reading_of(outputs: object, kind: OutputKind = OutputKind.CLASSIFICATION) -> Reading:
    """What the engine reads of the only row of these outputs."""
    tensor = torch.from_numpy(outputs) if isinstance(outputs, np.ndarray) else outputs
    return read(kind, tensor, "", rows=1, classes=0).readings()[0]


def told(*scores: float, kind: OutputKind = OutputKind.CLASSIFICATION, top_k: int = 4, **changes: Any) -> Prediction:
    """The prediction for one row of numbers."""
    return predict(reading_of(np.array([scores], np.float32), kind), card(**changes), top_k, None)


def test_the_best_classes_come_first_with_labels() -> None:
    """Scores 2, 0, 1, -1: the best two are classes 0 and 2."""
    prediction = told(2, 0, 1, -1, top_k=2)

    assert [(0, "cat", 2.0), (2, "crane", 1.0)] == [(c.class_index, c.label, c.logit) for c in prediction.classes]


def test_probabilities_are_the_softmax_over_all_classes() -> None:
    """Logits log 1, log 2, log 3, log 4 give tenths, whatever the number of classes shown."""
    prediction = told(*np.log([1, 2, 3, 4]), top_k=3)

    assert [0.4, 0.3, 0.2] == pytest.approx([entry.probability for entry in prediction.classes], rel=1e-6)


def test_labels_that_go_together_have_probabilities_of_their_own() -> None:
    """A sigmoid each."""
    prediction = told(0, 0, np.log(3), -np.log(3), kind=OutputKind.MULTI_LABEL)

    assert [2, 0, 1, 3] == [entry.class_index for entry in prediction.classes]
    assert [0.75, 0.5, 0.5, 0.25] == pytest.approx([entry.probability for entry in prediction.classes])


def test_ties_go_to_the_lower_index() -> None:
    """Equal scores have one order, so that repeated requests agree."""
    assert [1, 2, 3, 0] == [entry.class_index for entry in told(1, 3, 3, 3).classes]


def test_a_model_without_labels_gives_indices() -> None:
    """Unknown labels are empty."""
    assert [(1, "")] == [(entry.class_index, entry.label) for entry in told(1, 2, 0, 0, top_k=1, labels=()).classes]


@given(arrays.arrays(np.float32, (1, 4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_finite_scores_give_probabilities(logits: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Huge scores overflow nothing: probabilities are finite, fall with the rank and sum to one."""
    prediction = predict(reading_of(logits), card(), 4, None)
    probabilities = [entry.probability for entry in prediction.classes]

    assert sorted(probabilities, reverse=True) == probabilities
    assert 1.0 == pytest.approx(sum(probabilities))
    assert {0, 1, 2, 3} == {entry.class_index for entry in prediction.classes}


def test_values_keep_their_order() -> None:
    """Of a regression all are told, whatever the number of classes wanted; none is a probability."""
    prediction = told(1, 3, -2, kind=OutputKind.REGRESSION, top_k=1)

    assert [(0, "cat", 1.0), (1, "dog", 3.0), (2, "crane", -2.0)] == [
        (entry.class_index, entry.label, entry.logit) for entry in prediction.classes
    ]
    assert [0.0] * 3 == [entry.probability for entry in prediction.classes]


def test_a_segmentations_classes_are_ranked_by_area() -> None:
    """The class of most cells first, with its share, whatever its mean logit."""
    logits = np.zeros((1, 2, 1, 4), np.float32)
    logits[0, 0, 0] = 100, 0, 0, 0
    logits[0, 1, 0] = 0, 1, 1, 1
    prediction = predict(reading_of(logits, OutputKind.SEGMENTATION), card(), 4, None)

    assert [(1, 0.75, 0.75), (0, 25.0, 0.25)] == [(c.class_index, c.logit, c.probability) for c in prediction.classes]


def test_a_sequence_tells_the_best_class_of_each_step() -> None:
    """In order of the steps, all of them."""
    logits = np.array([[[0, 2, 0], [3, 0, 0], [0, 0, 1]]], np.float32)
    prediction = predict(reading_of(logits, OutputKind.SEQUENCE), card(), 1, None)

    assert [(0, "dog", 2.0), (1, "cat", 3.0), (2, "crane", 1.0)] == [
        (c.step, c.label, c.logit) for c in prediction.classes
    ]


def test_an_embedding_is_told_whole() -> None:
    """Its numbers, and no classes."""
    prediction = told(1, -2, kind=OutputKind.EMBEDDING)

    assert (1.0, -2.0) == prediction.embedding
    assert () == prediction.classes


DETECTIONS = [
    {
        "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 8.0, 4.0]]),
        "labels": torch.tensor([1, 9]),
        "scores": torch.tensor([0.25, 0.5]),
    }
]


def test_detections_lie_on_the_source() -> None:
    """An input half the source's size: edges double, labels are the card's, the best comes first."""
    geometry = Geometry(
        source_width=16,
        source_height=8,
        input_width=8,
        input_height=4,
        scale_x=2,
        scale_y=2,
        offset_x=0.5,
        offset_y=0.5,
    )
    reading = reading_of(DETECTIONS, OutputKind.DETECTION)
    prediction = predict(reading, card(), 4, geometry)

    assert [(9, "", 0.5, Box(4, 0, 12, 8)), (1, "dog", 0.25, Box(0, 0, 8, 8))] == [
        (one.class_index, one.label, one.score, one.box) for one in prediction.detections
    ]
    assert [Box(2, 0, 6, 4), Box(0, 0, 4, 4)] == [one.box for one in predict(reading, card(), 2, None).detections]
    assert [Box(2, 0, 6, 4)] == [one.box for one in predict(reading, card(), 1, None).detections]

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.cards import card

from camserve.server.prediction import predict


def test_the_best_classes_come_first_with_labels():
    """Scores 2, 0, 1, -1: the best two are classes 0 and 2."""
    prediction = predict(np.array([2, 0, 1, -1], np.float32), card(), 2)

    assert [(0, "cat", 2.0), (2, "crane", 1.0)] == [(c.class_index, c.label, c.logit) for c in prediction.classes]


def test_probabilities_are_the_softmax_over_all_classes():
    """Logits log 1, log 2, log 3, log 4 give tenths, whatever the number of classes shown."""
    prediction = predict(np.log([1, 2, 3, 4]).astype(np.float32), card(), 3)

    assert [0.4, 0.3, 0.2] == pytest.approx([entry.probability for entry in prediction.classes], rel=1e-6)


def test_ties_go_to_the_lower_index():
    """Equal scores have one order, so that repeated requests agree."""
    prediction = predict(np.array([1, 3, 3, 3], np.float32), card(), 4)

    assert [1, 2, 3, 0] == [entry.class_index for entry in prediction.classes]


def test_a_model_without_labels_gives_indices():
    """Unknown labels are empty."""
    prediction = predict(np.array([1, 2, 0, 0], np.float32), card(labels=()), 1)

    assert [(1, "")] == [(entry.class_index, entry.label) for entry in prediction.classes]


@given(arrays.arrays(np.float32, 4, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_finite_scores_give_probabilities(logits):
    """Huge scores overflow nothing: probabilities are finite, fall with the rank and sum to one."""
    prediction = predict(logits, card(), 4)
    probabilities = [entry.probability for entry in prediction.classes]

    assert sorted(probabilities, reverse=True) == probabilities
    assert 1.0 == pytest.approx(sum(probabilities))
    assert {0, 1, 2, 3} == {entry.class_index for entry in prediction.classes}

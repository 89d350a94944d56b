"""Conditions: what they may ask, what they are told, and that nobody can make one that hurts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cards import LABELS, card

from camserve.server.conditions import VARIABLES, CompiledCondition, ExpressionError, check_condition
from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import Box, Circumstances, Detection, Lane, OutputKind, Reading
from camserve.server.prediction import predict

PLAIN = Circumstances(model="tiny", version="3", lane=Lane.BULK, labels={"line": "7"}, asked=False)


def classified(*probabilities: float, kind: OutputKind = OutputKind.CLASSIFICATION) -> Reading:
    """What a model with these probabilities said."""
    shares = np.array(probabilities, np.float32)
    return Reading(kind=kind, scores=np.log(shares), probabilities=shares)


def detected(*found: tuple[int, float]) -> Reading:
    """What a detector said: class and score of each object, best first."""
    nothing = np.zeros(0, np.float32)
    objects = tuple(Detection(box=Box(0, 0, 1, 1), class_index=index, score=score) for index, score in found)
    return Reading(kind=OutputKind.DETECTION, scores=nothing, probabilities=nothing, detections=objects)


def holds(text: str, reading: Reading, circumstances: Circumstances = PLAIN) -> bool:
    """Whether a condition holds."""
    return CompiledCondition(text, LABELS)(reading, circumstances)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('label == "dog"', True),
        ('label == "dog" || score < 0.3', True),
        ('label == "cat" || score < 0.3', False),
        ('label in ["crane", "dog"] && index == 1', True),
        ("score > 0.499 && score < 0.501", True),
        ("second > 0.249 && second < 0.251 && margin > 0.249 && margin < 0.251", True),
        ('top == ["dog", "crane", "cat", "lorry"]', True),
        ('"cat" in top && top[0] != "cat"', True),
        ('scores["crane"] > 0.2', True),
        ('scores.exists(name, name.startsWith("c") && scores[name] > 0.3)', False),
        ("size(values) == 4 && values[1] > values[0]", True),
        ("count == 0", True),
        ('model == "tiny" && version == "3" && lane == "bulk"', True),
        ('labels["line"] == "7" && !asked', True),
        ('"shift" in labels && labels.shift == "night"', False),
        ('label.matches("^d.g$")', True),
        ("true", True),
    ],
)
def test_a_condition_sees_the_prediction_and_the_request(text, expected):
    """Every variable, over shares of 1/8, 1/2, 1/4 and 1/8."""
    assert expected is holds(text, classified(0.125, 0.5, 0.25, 0.125))


def test_a_detector_is_asked_about_what_it_found():
    """The best object speaks for the image; the others can be asked about too."""
    reading = detected((2, 0.75), (0, 0.5), (2, 0.25))

    assert holds('label == "crane" && index == 2 && score == 0.75 && second == 0.5 && count == 3', reading)
    assert holds('top == ["crane", "cat", "crane"] && scores["crane"] == 0.75 && !("dog" in scores)', reading)
    assert holds('count == 0 && label == "" && index == -1 && score == 0.0 && size(top) == 0', detected())


def test_a_sequence_is_spoken_for_by_its_least_sure_step():
    """Three steps, the second undecided between cat and lorry."""
    shares = np.array([[0.9, 0.1, 0, 0], [0.5, 0, 0, 0.4], [0, 0, 0.8, 0.2]], np.float32)
    reading = Reading(kind=OutputKind.SEQUENCE, scores=shares, probabilities=shares)

    assert holds('label == "cat" && score == 0.5 && margin < 0.11 && top == ["cat", "cat", "crane"]', reading)


@pytest.mark.parametrize("kind", [OutputKind.REGRESSION, OutputKind.EMBEDDING])
def test_numbers_are_asked_about_as_values(kind):
    """There is no class to speak of."""
    reading = Reading(kind=kind, scores=np.array([1.5, -2], np.float32), probabilities=np.zeros(0, np.float32))

    assert holds('values[0] > 1.0 && values[1] == -2.0 && label == "" && index == -1 && score == 0.0', reading)


@settings(deadline=None)  # A busy machine may take any time over one example.
@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12), st.sampled_from(list(OutputKind)[:2]))
def test_a_condition_sees_what_the_prediction_says(logits, kind):
    """Label, index, score and order are those of the message that the caller gets, ties included."""
    scores = np.array(logits, np.float32)
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    reading = Reading(kind=kind, scores=scores, probabilities=shares.astype(np.float32))
    names = tuple(f"class {place}" for place in range(len(logits)))
    told = predict(reading, card(labels=names, class_count=len(names)), 5, None).classes

    text = (
        f'label == "{told[0].label}" && index == {told[0].class_index} && score == {told[0].probability!r} && '
        f"second == {told[1].probability!r} && top == {[entry.label for entry in told]}"
    )

    assert CompiledCondition(text, names)(reading, PLAIN)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('lable == "dog"', "line 1, column 1: undeclared reference to 'lable' (did you mean label?"),
        ("threshold < 0.5", "line 1, column 1: undeclared reference to 'threshold' (known: label, index, score"),
        ("score < 0.5 ||\n  label < 3", "line 2, column 9: found no matching overload"),
        ("score < 1", "(write the whole number with a point, such as 1.0)"),
        ("score <", "line 1, column 8: Syntax error"),
        ('label = "dog"', "(write == for equal)"),
        (
            'score < 0.5 and label == "dog"',
            "line 1, column 13: Syntax error: mismatched input 'and' expecting <EOF> (write &&",
        ),
        ("score", "it gives a double; a condition is true or false"),
        ("dyn(true)", "it gives a dyn"),
        ("", "line 1, column 1: Syntax error"),
        ('__import__("os")', "undeclared reference to '__import__'"),
        ('label.__class__ == "x"', "cannot be the operand of a select operation"),
    ],
)
def test_what_is_no_condition_is_refused_with_its_place(text, complaint):
    """Line and column, what is wrong, and what was probably meant."""
    with pytest.raises(ExpressionError) as caught:
        check_condition(text)

    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x" * 2001, "2001 characters, and at most 2000"),
        ('"' + "x" * 5000 + '" == label', "at most 2000"),
        ("(" * 500 + "true" + ")" * 500, "recursion limit"),
        ("[" * 500 + "]" * 500 + " == []", "recursion limit"),
        ("score" + " + score" * 200 + " < 1.0", "recursion depth"),
        ("9**9**9 > 1", "Syntax error"),
        ('label * 1000 == ""', "no matching overload"),
        ("99999999999999999999 > 1", "invalid int literal"),
    ],
)
def test_hostile_text_is_refused_before_it_runs(text, complaint):
    """Too long, too deep, or what the language has no operator for."""
    with pytest.raises(ExpressionError) as caught:
        check_condition(text)

    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("".join(f"[0,1,2,3,4,5,6,7,8,9].all(x{depth}, " for depth in range(8)) + "true" + ")" * 8, "Iteration budget"),
        ('top[9] == "dog"', "Index error"),
        ('scores["wolf"] > 0.5', "Key not found"),
        ('labels["shift"] == "night"', "Key not found"),
        ("6 / count > 1", "divide by zero"),
        ("9223372036854775807 + index > 0", "overflow"),
        ("label.matches(labels.line + '(')", "invalid regular expression"),
    ],
)
def test_a_condition_without_a_value_says_so(text, problem):
    """Loops have a budget, and what cannot be looked up is no truth value."""
    with pytest.raises(ExecutionFailed) as caught:
        holds(text, classified(0.125, 0.5, 0.25, 0.125))

    assert Reason.RULE_FAILED is caught.value.reason
    assert problem in caught.value.message


def test_a_regular_expression_that_explodes_elsewhere_is_linear_here():
    """(a+)+$ over twenty thousand letters takes a backtracking engine longer than the universe."""
    long = Circumstances(model="m", version="1", lane=Lane.STANDARD, labels={"text": "a" * 20_000 + "!"}, asked=False)

    assert not holds('labels.text.matches("^(a+)+$")', classified(0.5, 0.5), long)


def test_only_what_a_condition_looks_at_is_computed():
    """A name in a text, or one that a loop binds, is no variable."""
    condition = CompiledCondition('label == "scores" || top.exists(second, second == "dog")')

    assert {"label", "top"} == condition.variables


def test_every_variable_has_a_type_and_a_meaning():
    """Documentation is made from them."""
    for name, variable in VARIABLES.items():
        assert variable.meaning.endswith(".")
        check_condition(f"type({name}) == type({name})")

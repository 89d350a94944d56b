import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from camserve.server.engine.targets import resolve, scores, select_output
from camserve.server.errors import ExecutionFailed, InvalidRequest, Reason
from camserve.server.jobs import ResolvedTarget, Score, Target, TargetKind

LOGITS = np.array([0.0, 2.0, -1.0, 2.0, 1.0], dtype=np.float32)
Pair = collections.namedtuple("Pair", ["logits", "features"])  # noqa: PYI024 - as models return it


def target_of(index: int, score: Score = Score.LOGIT) -> ResolvedTarget:
    """A target whose value does not matter here."""
    return ResolvedTarget(class_index=index, score=score, value=0.0)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        pytest.param(TargetKind.PREDICTED, 0, [1], id="predicted, tie"),
        pytest.param(TargetKind.CLASS_INDEX, 0, [0], id="class zero is a class"),
        pytest.param(TargetKind.CLASS_INDEX, 4, [4], id="last class"),
        pytest.param(TargetKind.KTH, 1, [1], id="first"),
        pytest.param(TargetKind.KTH, 2, [3], id="second, tie"),
        pytest.param(TargetKind.KTH, 5, [2], id="worst"),
        pytest.param(TargetKind.TOP_K, 3, [1, 3, 4], id="top three"),
        pytest.param(TargetKind.TOP_K, 5, [1, 3, 4, 0, 2], id="all"),
    ],
)
def test_targets_name_classes(kind: TargetKind, value: int, expected: list[int]) -> None:
    """Best first, and of equal logits the lower index; values are the logits themselves."""
    resolved = resolve(LOGITS, Target(kind=kind, value=value))

    assert expected == [one.class_index for one in resolved]
    assert [float(LOGITS[index]) for index in expected] == [one.value for one in resolved]
    assert [(rank, len(expected)) for rank in range(len(expected))] == [(one.rank, one.count) for one in resolved]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (TargetKind.CLASS_INDEX, -1),
        (TargetKind.CLASS_INDEX, 5),
        (TargetKind.KTH, 0),
        (TargetKind.KTH, 6),
        (TargetKind.TOP_K, 0),
        (TargetKind.TOP_K, 6),
    ],
)
def test_classes_that_do_not_exist_are_refused(kind: TargetKind, value: int) -> None:
    """The refusal names the number of classes; nothing is truncated or wrapped around."""
    with pytest.raises(InvalidRequest, match="has 5 classes") as refusal:
        resolve(LOGITS, Target(kind=kind, value=value))

    assert Reason.CLASS_OUT_OF_RANGE == refusal.value.reason
    assert "5" == refusal.value.metadata["classes"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_the_row(bad: float) -> None:
    """There is nothing to rank."""
    with pytest.raises(ExecutionFailed):
        resolve(np.array([0.0, bad], dtype=np.float32), Target())


def test_a_softmax_target_has_its_probability_as_value() -> None:
    """Also for logits whose exponentials overflow."""
    (resolved,) = resolve(np.array([1000.0, 1000.0], dtype=np.float32), Target(score=Score.SOFTMAX))

    assert 0.5 == resolved.value


def test_scores_pick_each_rows_own() -> None:
    """Logit, softmax and nothing side by side; rows without a target count zero and have no gradient."""
    logits = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]], requires_grad=True)

    picked = scores(logits, [target_of(1), target_of(0, Score.SOFTMAX), None])
    (gradient,) = torch.autograd.grad(picked.sum(), logits)

    assert [2.0, 0.5, 0.0] == picked.tolist()
    assert [[0.0, 1.0], [0.25, -0.25], [0.0, 0.0]] == gradient.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("score", Score)
def test_a_rows_gradient_does_not_depend_on_the_others(dtype: torch.dtype, score: Score) -> None:
    """Whatever the neighbours' targets and scores are, its bits are the same."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    company: Sequence[Sequence[ResolvedTarget | None]] = [
        [None, None, None],
        [target_of(3), None, target_of(0)],
        [target_of(3, Score.SOFTMAX), target_of(2), None],
        [target_of(3, Score.SOFTMAX), target_of(2, Score.SOFTMAX), target_of(1, Score.SOFTMAX)],
    ]
    gradients = [
        torch.autograd.grad(scores(logits, [others[0], target_of(5, score), *others[1:]]).sum(), logits)[0][1]
        for others in company
    ]

    for gradient in gradients[1:]:
        assert gradients[0].equal(gradient)


def test_logits_may_be_shifted() -> None:
    """The gradient of a logit does not see a constant added to all of them."""
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    gradients = [torch.autograd.grad(scores(logits + shift, [target_of(2)]).sum(), logits)[0] for shift in (0.0, 100.0)]

    assert gradients[0].equal(gradients[1])


TENSOR = torch.zeros(2, 3)
OTHER = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("outputs", "path"),
    [
        pytest.param(TENSOR, "", id="tensor"),
        pytest.param((TENSOR,), "", id="only one of a tuple"),
        pytest.param({"out": [TENSOR, 3, None]}, "", id="only tensor of a structure"),
        pytest.param((OTHER, TENSOR), "1", id="position"),
        pytest.param({"aux": OTHER, "out": TENSOR}, "out", id="key"),
        pytest.param({"heads": (OTHER, {"scores": TENSOR})}, "heads.1.scores", id="nested"),
        pytest.param(Pair(TENSOR, OTHER), "logits", id="named tuple"),
    ],
)
def test_the_logits_are_found_in_what_a_model_returns(outputs: Any, path: str) -> None:
    """By path, or without one when there is no choice."""
    assert TENSOR is select_output(outputs, path)


@pytest.mark.parametrize(
    ("outputs", "path", "message"),
    [
        pytest.param((TENSOR, OTHER), "", "several tensors.*paths: 0, 1; name .* output.path", id="ambiguous"),
        pytest.param({"aux": OTHER, "out": TENSOR}, "logits", "no tensor at 'logits'; paths: aux, out", id="unknown"),
        pytest.param(None, "", "holds no tensor; paths: none; return a tensor", id="nothing"),
        pytest.param(torch.zeros(2), "", r"shape \(2,\)", id="one number a row"),
        pytest.param(torch.zeros(2, 3, 4, 4), "", r"shape \(2, 3, 4, 4\)", id="dense"),
        pytest.param(torch.zeros(2, 3, dtype=torch.int64), "", "int64.*before any argmax", id="class numbers"),
    ],
)
def test_nothing_is_guessed_about_outputs(outputs: Any, path: str, message: str) -> None:
    """What is not clearly (b, classes) is refused, with the paths that exist."""
    with pytest.raises(ExecutionFailed, match=message) as refused:
        select_output(outputs, path)

    assert Reason.MODEL_FAILED == refused.value.reason

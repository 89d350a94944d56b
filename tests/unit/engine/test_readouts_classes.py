from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputReST, FinerWeightedTarget
from torch import Tensor, nn
from torchcam.methods import FinerCAM

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts import Aim, Readout, read
from camserve.server.errors import CamserveError, ExecutionFailed, InvalidRequest, Reason, Unsupported
from camserve.server.jobs import (
    About,
    ClassesAbove,
    ClassIndex,
    Difference,
    Embedding,
    KthClass,
    OutputKind,
    Polarity,
    Predicted,
    Score,
    Steps,
    Target,
    TopClasses,
)

LOGITS = torch.tensor([[0.0, 2.0, -1.0, 2.0, 1.0]])
KINDS = (OutputKind.CLASSIFICATION, OutputKind.MULTI_LABEL, OutputKind.REGRESSION)


def readout(logits: Tensor, kind: OutputKind = OutputKind.CLASSIFICATION) -> Readout:
    """What a pass makes of a model that returns these logits."""
    return read(kind, logits, "", rows=logits.shape[0], classes=logits.shape[1])


def aim_at(index: int, score: Score = Score.LOGIT, *, row: int = 0, logits: Tensor | None = None) -> Aim:
    """An aim at one class of seven."""
    (aim,) = readout(torch.zeros(4, 7) if logits is None else logits).aims(
        row, Target(about=ClassIndex(index), score=score)
    )
    return aim


def classes_of(about: About, logits: Tensor = LOGITS, kind: OutputKind = OutputKind.CLASSIFICATION) -> list[int | None]:
    """The classes a target names."""
    return [aim.target.class_index for aim in readout(logits, kind).aims(0, Target(about=about))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("about", "expected"),
    [
        pytest.param(Predicted(), [1], id="predicted, tie"),
        pytest.param(ClassIndex(0), [0], id="class zero is a class"),
        pytest.param(ClassIndex(4), [4], id="last class"),
        pytest.param(KthClass(1), [1], id="first"),
        pytest.param(KthClass(2), [3], id="second, tie"),
        pytest.param(KthClass(5), [2], id="worst"),
        pytest.param(TopClasses(3), [1, 3, 4], id="top three"),
        pytest.param(TopClasses(5), [1, 3, 4, 0, 2], id="all"),
    ],
)
def test_targets_name_classes(kind: OutputKind, about: About, expected: list[int]) -> None:
    """Best first, and of equal logits the lower index; values are the logits themselves."""
    targets = [aim.target for aim in readout(LOGITS, kind).aims(0, Target(about=about))]

    assert expected == [one.class_index for one in targets]
    assert LOGITS[0, expected].tolist() == [one.value for one in targets]
    assert [(rank, len(expected)) for rank in range(len(expected))] == [(one.rank, one.count) for one in targets]


@pytest.mark.parametrize(
    ("kind", "threshold", "expected"),
    [
        pytest.param(OutputKind.CLASSIFICATION, 0.25, [1, 3], id="softmax"),
        pytest.param(OutputKind.MULTI_LABEL, 0.5, [1, 3, 4], id="sigmoid, zero is not above a half"),
    ],
)
def test_classes_above_a_threshold(kind: OutputKind, threshold: float, expected: list[int]) -> None:
    """Every class whose probability is above it, best first."""
    assert expected == classes_of(ClassesAbove(threshold), kind=kind)


def test_nothing_above_a_threshold_is_told() -> None:
    """The refusal says what the largest probability is."""
    with pytest.raises(InvalidRequest, match=r"no class is above 0\.9: the largest is 0\.5"):
        readout(torch.zeros(1, 2)).aims(0, Target(about=ClassesAbove(0.9)))


@pytest.mark.parametrize(
    "about", [ClassIndex(-1), ClassIndex(5), KthClass(0), KthClass(6), TopClasses(0), TopClasses(6)]
)
def test_classes_that_do_not_exist_are_refused(about: About) -> None:
    """The refusal names the number of classes; nothing is truncated or wrapped around."""
    with pytest.raises(InvalidRequest, match="has 5 classes") as refusal:
        classes_of(about)

    assert Reason.CLASS_OUT_OF_RANGE == refusal.value.reason
    assert "5" == refusal.value.metadata["classes"]


@pytest.mark.parametrize(
    ("kind", "target", "refusal", "message"),
    [
        (
            OutputKind.CLASSIFICATION,
            Target(about=Difference(1, 5)),
            InvalidRequest,
            "other class index 5 is out of range",
        ),
        (
            OutputKind.CLASSIFICATION,
            Target(about=Difference(1, 1)),
            InvalidRequest,
            "needs two classes, and both are 1",
        ),
        (
            OutputKind.CLASSIFICATION,
            Target(about=Embedding((1.0,))),
            Unsupported,
            "'embedding' does not fit .* classification",
        ),
        (
            OutputKind.MULTI_LABEL,
            Target(about=Steps()),
            Unsupported,
            "'steps' does not fit .* multi-label; .* predicted",
        ),
        (OutputKind.REGRESSION, Target(about=ClassesAbove(0.1)), Unsupported, "'above' does not fit .* regression"),
        (
            OutputKind.REGRESSION,
            Target(score=Score.SOFTMAX),
            Unsupported,
            "'softmax' does not fit .* regression; it has: logit",
        ),
        (OutputKind.REGRESSION, Target(score=Score.REST), Unsupported, "'rest' does not fit"),
    ],
)
def test_what_makes_no_sense_is_refused(
    kind: OutputKind, target: Target, refusal: type[CamserveError], message: str
) -> None:
    """The refusal names the target, the kind of output and what that has."""
    with pytest.raises(refusal, match=message):
        readout(LOGITS, kind).aims(0, target)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_the_row(bad: float) -> None:
    """There is nothing to rank; the row is still read, and the others are not touched."""
    both = readout(torch.tensor([[0.0, bad], [1.0, 0.0]]))

    with pytest.raises(ExecutionFailed, match="NaN or infinite"):
        both.aims(0, Target())

    assert [2, 2] == [len(reading.scores) for reading in both.readings()]
    assert 0 == both.aims(1, Target())[0].target.class_index


def test_a_row_without_an_aim_keeps_a_gradient_of_zero_even_if_it_is_not_finite() -> None:
    """A softmax asked for by a neighbour makes no NaN of it."""
    logits = torch.tensor([[0.0, torch.nan], [1.0, 1.0]], requires_grad=True)
    two = readout(logits)

    (gradient,) = torch.autograd.grad(two.scores([None, *two.aims(1, Target(score=Score.SOFTMAX))]).sum(), logits)

    assert [[0.0, 0.0], [0.25, -0.25]] == gradient.tolist()


@pytest.mark.parametrize(
    ("kind", "score", "expected"),
    [
        (OutputKind.CLASSIFICATION, Score.SOFTMAX, 0.5),
        (OutputKind.CLASSIFICATION, Score.REST, 1000 + np.log(0.5)),
        (OutputKind.MULTI_LABEL, Score.SOFTMAX, 1.0),
        (OutputKind.MULTI_LABEL, Score.REST, 1000.0),
    ],
)
def test_a_target_has_its_score_as_value(kind: OutputKind, score: Score, expected: float) -> None:
    """Also for logits whose exponentials overflow."""
    (aim,) = readout(torch.tensor([[1000.0, 1000.0]]), kind).aims(0, Target(score=score))

    assert expected == pytest.approx(aim.target.value, rel=1e-12)


def test_readings_hold_logits_and_probabilities() -> None:
    """Softmax sums to one, sigmoid counts each class for itself, values are no probabilities."""
    single, several, values = (readout(torch.tensor([[0.0, 0.0]]), kind).readings()[0] for kind in KINDS)

    assert [0.5, 0.5] == single.probabilities.tolist() == several.probabilities.tolist()
    assert 0 == values.probabilities.size
    assert [0.0, 0.0] == single.scores.tolist() == several.scores.tolist() == values.scores.tolist()
    assert np.float32 == single.scores.dtype == single.probabilities.dtype == values.probabilities.dtype


def test_a_regression_may_return_one_number_a_row() -> None:
    """(b) is read as (b, 1)."""
    found = read(OutputKind.REGRESSION, torch.tensor([3.0, 4.0]), "", rows=2, classes=1)

    assert [[3.0], [4.0]] == [reading.scores.tolist() for reading in found.readings()]
    assert 4.0 == found.aims(1, Target())[0].target.value


def test_scores_pick_each_rows_own() -> None:
    """Logit, softmax and nothing side by side; rows without a target count zero and have no gradient."""
    logits = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]], requires_grad=True)

    picked = readout(logits).scores([aim_at(1), aim_at(0, Score.SOFTMAX), None])
    (gradient,) = torch.autograd.grad(picked.sum(), logits)

    assert [2.0, 0.5, 0.0] == picked.tolist()
    assert [[0.0, 1.0], [0.25, -0.25], [0.0, 0.0]] == gradient.tolist()


def test_as_many_aims_as_rows() -> None:
    """A short list is refused, not cut off."""
    with pytest.raises(ValueError, match="1 aims for a batch of 2 rows"):
        readout(torch.zeros(2, 7)).scores([aim_at(1)])


def test_evidence_against_turns_the_sign() -> None:
    """The value told is the score before that; targets that differ by polarity differ by key."""
    logits = torch.tensor([[1.0, 3.0]], requires_grad=True)
    read_once = readout(logits)
    (against,) = read_once.aims(0, Target(polarity=Polarity.AGAINST))
    (towards,) = read_once.aims(0, Target())
    (gradient,) = torch.autograd.grad(read_once.scores([against]).sum(), logits)

    assert [[0.0, -1.0]] == gradient.tolist()
    assert 3.0 == against.target.value
    assert Polarity.AGAINST is against.target.polarity
    assert against.key != towards.key


def test_one_class_rather_than_another() -> None:
    """The score of the first less the weighted score of the second."""
    logits = torch.tensor([[1.0, 3.0, 7.0]], requires_grad=True)
    found = readout(logits)
    (aim,) = found.aims(0, Target(about=Difference(2, 0, 0.5)))
    (gradient,) = torch.autograd.grad(found.scores([aim]).sum(), logits)

    assert 6.5 == aim.target.value
    assert (2, 0) == (aim.target.class_index, aim.target.other_class_index)
    assert [[-0.5, 0.0, 1.0]] == gradient.tolist()


def test_targets_that_mean_the_same_have_one_key() -> None:
    """The predicted class by that name, by its index and as one of the best three."""
    found = readout(LOGITS)
    keys = [
        found.aims(0, Target(about=about))[0].key for about in (Predicted(), ClassIndex(1), KthClass(1), TopClasses(3))
    ]

    assert 1 == len(set(keys))
    assert found.aims(0, Target(score=Score.REST))[0].key not in keys


FINER = Contrast(classes=3, weight=0.6)
FINER_BY_PROBABILITY = Contrast(classes=3, weight=1.0, by_probability=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("contrast", [None, FINER, FINER_BY_PROBABILITY])
@pytest.mark.parametrize("score", Score)
def test_a_rows_gradient_does_not_depend_on_the_others(
    dtype: torch.dtype, score: Score, contrast: Contrast | None
) -> None:
    """Whatever the neighbours' targets, scores and contrasts are, its bits are the same."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    found = readout(logits)
    (own,) = found.aims(1, Target(about=ClassIndex(5), score=score), contrast)
    (finer,) = found.aims(2, Target(score=Score.SOFTMAX), FINER)
    (shared,) = found.aims(3, Target(), FINER_BY_PROBABILITY)
    company: Sequence[Sequence[Aim | None]] = [
        [None, None, None],
        [aim_at(3), None, aim_at(0)],
        [aim_at(3, Score.SOFTMAX), aim_at(2, Score.REST), None],
        [aim_at(3, Score.SOFTMAX), finer, shared],
        [None, shared, finer],
    ]
    gradients = [
        torch.autograd.grad(found.scores([others[0], own, *others[1:]]).sum(), logits)[0][1] for others in company
    ]

    for gradient in gradients[1:]:
        assert gradients[0].equal(gradient)
    assert gradients[0].any()


def test_logits_may_be_shifted() -> None:
    """The gradient of a logit does not see a constant added to all of them."""
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    gradients = [
        torch.autograd.grad(readout(logits + shift).scores([aim_at(2)]).sum(), logits)[0] for shift in (0.0, 100.0)
    ]

    assert gradients[0].equal(gradients[1])


def test_rest_is_that_of_pytorch_grad_cam() -> None:
    """Value and gradient."""
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    found = readout(logits)
    aims = [found.aims(row, Target(about=ClassIndex(4), score=Score.REST))[0] for row in range(3)]
    theirs = ClassifierOutputReST(4)(logits)
    (expected,) = torch.autograd.grad(theirs.sum(), logits)
    (gradient,) = torch.autograd.grad(found.scores(aims).sum(), logits)

    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert theirs.tolist() == pytest.approx([aim.target.value for aim in aims], rel=1e-12)


@pytest.mark.parametrize("is_saturated", [False, True])
def test_finer_by_probability_is_that_of_pytorch_grad_cam(is_saturated: bool) -> None:  # noqa: FBT001
    """Value and gradient, with the probabilities differentiated; also where those of the nearest classes are all but zero."""
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if is_saturated:
        logits[:, 2] += 25
    logits.requires_grad_()
    found = readout(logits)
    aims = [found.aims(row, Target(), FINER_BY_PROBABILITY)[0] for row in range(2)]
    nearest = np.argsort(np.abs((logits - logits.amax(1, keepdim=True)).detach().numpy()), axis=1)
    theirs = torch.stack(
        [
            FinerWeightedTarget(int(order[0]), [int(one) for one in order[1:4]], 1.0)(row)
            for order, row in zip(nearest, logits, strict=True)
        ]
    )
    (expected,) = torch.autograd.grad(theirs.sum(), logits)
    (gradient,) = torch.autograd.grad(found.scores(aims).sum(), logits)

    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert theirs.tolist() == pytest.approx([aim.target.value for aim in aims], rel=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_finer_is_that_of_torchcam(classes: int) -> None:
    """Value and gradient, also with fewer classes than are compared with."""
    logits = torch.randn(
        2, classes, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True
    )
    found = readout(logits)
    aims = [found.aims(row, Target(about=ClassIndex(1)), FINER)[0] for row in range(2)]
    with FinerCAM(
        nn.Sequential(nn.Conv2d(3, classes, 1), nn.AdaptiveAvgPool2d(1)), "0", input_shape=(3, 8, 8)
    ) as extractor:
        theirs = extractor._contrastive_scores(1, logits, None)
    (expected,) = torch.autograd.grad(theirs.sum(), logits)
    (gradient,) = torch.autograd.grad(found.scores(aims).sum(), logits)

    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert theirs[:, 0].tolist() == pytest.approx([aim.target.value for aim in aims], rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "kind", "about", "message"),
    [
        (LOGITS[:, :1], OutputKind.CLASSIFICATION, Predicted(), "no other classes"),
        (LOGITS, OutputKind.REGRESSION, Predicted(), "no other classes"),
        (LOGITS, OutputKind.CLASSIFICATION, Difference(0, 1), "names the other class itself"),
    ],
)
def test_a_contrast_needs_other_classes(logits: Tensor, kind: OutputKind, about: About, message: str) -> None:
    """What cannot be compared is refused, with what would work."""
    with pytest.raises(Unsupported, match=f"{message}; use grad-cam"):
        readout(logits, kind).aims(0, Target(about=about), FINER)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [(torch.zeros(3, 5), "3 rows for a batch of 2"), (torch.zeros(2, 4), "4 classes, and its card says 5")],
)
def test_outputs_that_do_not_fit_the_batch_are_refused(outputs: Any, message: str) -> None:
    """A model that returns other rows or classes than it did at load is not read."""
    with pytest.raises(ExecutionFailed, match=message):
        read(OutputKind.CLASSIFICATION, outputs, "", rows=2, classes=5)


def test_a_detached_readout_keeps_its_readings() -> None:
    """The graph is gone, what was read stays."""
    found = readout(torch.zeros(1, 2, requires_grad=True))
    assert found.requires_grad

    found.detach()

    assert not found.requires_grad
    assert [0.0, 0.0] == found.readings()[0].scores.tolist()

import pytest
import torch

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts import Readout, read
from camserve.server.errors import CamserveError, ExecutionFailed, InvalidRequest, Unsupported
from camserve.server.jobs import About, ClassIndex, OutputKind, Predicted, Score, Steps, Target

# Predicted are the classes 2, 0, 1 and 1.
LOGITS = torch.tensor([[[0.0, 1.0, 3.0], [2.0, 1.0, 0.0], [0.0, 5.0, 4.0], [0.0, 1.0, 0.0]]])


def sequence(logits: torch.Tensor) -> Readout:
    """What a pass makes of a model that returns these logits."""
    return read(OutputKind.SEQUENCE, logits, "", rows=logits.shape[0], classes=logits.shape[2])


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        pytest.param(Predicted(), [(0, 2), (1, 0), (2, 1), (3, 1)], id="every step"),
        pytest.param(Steps(), [(0, 2), (1, 0), (2, 1), (3, 1)], id="every step by name"),
        pytest.param(Steps(first=2), [(2, 1), (3, 1)], id="the rest"),
        pytest.param(Steps(first=1, count=2), [(1, 0), (2, 1)], id="some"),
        pytest.param(Steps(classes=(0, 0)), [(0, 0), (1, 0)], id="given classes"),
        pytest.param(Steps(classes=(2,), first=3), [(3, 2)], id="a given class from a step"),
        pytest.param(Steps(classes=(2,), first=3, count=1), [(3, 2)], id="counted too"),
    ],
)
def test_each_step_has_an_aim(about: About, expected: list[tuple[int, int]]) -> None:
    """In order; the value is the step's own logit."""
    targets = [aim.target for aim in sequence(LOGITS).aims(0, Target(about=about))]

    assert expected == [(one.step, one.class_index) for one in targets]
    assert [LOGITS[0, step, index].item() for step, index in expected] == [one.value for one in targets]
    assert [(rank, len(expected)) for rank in range(len(expected))] == [(one.rank, one.count) for one in targets]


@pytest.mark.parametrize(
    ("about", "refusal", "message"),
    [
        (Steps(first=4), InvalidRequest, "steps 4 to 4 .* has steps 0 to 3"),
        (Steps(first=-1), InvalidRequest, "steps -1"),
        (Steps(first=2, count=3), InvalidRequest, "steps 2 to 4 .* has steps 0 to 3"),
        (Steps(count=0), InvalidRequest, "steps 0 to 0"),
        (Steps(classes=(0,) * 5), InvalidRequest, "steps 0 to 4"),
        (Steps(classes=(0, 1), count=3), InvalidRequest, "2 classes are given for 3 steps"),
        (Steps(classes=(3,)), InvalidRequest, "class index 3 is out of range: the model has 3 classes"),
        (ClassIndex(0), Unsupported, "'class_index' does not fit .* sequence; it can be asked about: predicted, steps"),
    ],
)
def test_steps_that_do_not_exist_are_refused(about: About, refusal: type[CamserveError], message: str) -> None:
    """Nothing is cut off."""
    with pytest.raises(refusal, match=message):
        sequence(LOGITS).aims(0, Target(about=about))


def test_rows_are_scored_at_their_own_steps() -> None:
    """Logit, softmax, a contrast and nothing side by side; the gradient is that step's alone."""
    logits = LOGITS.repeat(4, 1, 1).double().requires_grad_()
    found = sequence(logits)
    finer = Contrast(classes=1, weight=0.5)
    aims = [
        found.aims(0, Target(about=Steps(first=2, count=1)))[0],
        found.aims(1, Target(about=Steps(first=3), score=Score.SOFTMAX))[0],
        found.aims(2, Target(), finer)[0],
    ]
    scores = found.scores([*aims, None])
    (gradient,) = torch.autograd.grad(scores.sum(), logits)

    assert [5.0, logits[1, 3].softmax(0)[1].item(), 3.0 - 0.5 * 1.0, 0.0] == pytest.approx(scores.tolist())
    assert [(0, 2), (1, 3), (2, 0)] == sorted({(row, step) for row, step, _ in gradient.nonzero().tolist()})
    assert 1 == aims[2].target.other_class_index
    assert scores[:3].tolist() == pytest.approx([aim.target.value for aim in aims])


def test_readings_hold_every_step() -> None:
    """(steps, classes), of logits and probabilities."""
    (reading,) = sequence(LOGITS).readings()

    assert LOGITS[0].tolist() == reading.scores.tolist()
    assert [1.0] * 4 == pytest.approx(reading.probabilities.sum(1).tolist())


def test_logits_that_are_not_finite_fail_the_row() -> None:
    """Whatever the step."""
    logits = LOGITS.clone()
    logits[0, 3, 0] = torch.inf
    with pytest.raises(ExecutionFailed, match="NaN or infinite"):
        sequence(logits).aims(0, Target(about=Steps(count=1)))


def test_a_contrast_needs_other_classes() -> None:
    """One class has none."""
    with pytest.raises(Unsupported, match="no other classes; use grad-cam"):
        sequence(LOGITS[:, :, :1]).aims(0, Target(), Contrast(classes=3, weight=1.0))


def test_as_many_aims_as_rows() -> None:
    """A short list is refused, not cut off."""
    with pytest.raises(ValueError, match="0 aims for a batch of 1 rows"):
        sequence(LOGITS).scores([])

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget, SemanticSegmentationTarget
from torch import Tensor

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts import Readout, read
from camserve.server.errors import CamserveError, ExecutionFailed, InvalidRequest, Unsupported
from camserve.server.jobs import (
    About,
    ClassesAbove,
    ClassIndex,
    Difference,
    Embedding,
    KthClass,
    OutputKind,
    PlacedRegion,
    Polarity,
    Predicted,
    Region,
    Score,
    Target,
    TopClasses,
)

# Of the eight cells four are predicted as class 2, three as class 0, one as class 3, none as class 1.
PREDICTED = np.array([[2, 2, 0, 0], [2, 2, 0, 3]])


def dense(logits: Tensor) -> Readout:
    """What a pass makes of a model that returns these logits."""
    return read(OutputKind.SEGMENTATION, {"out": logits}, "", rows=logits.shape[0], classes=logits.shape[1])


def logits_of(predicted: np.ndarray[Any, Any] = PREDICTED, *, rows: int = 1, classes: int = 4) -> Tensor:
    """Random logits, double, with the wanted class the largest at each cell: (rows, classes, *cells)."""
    generator = torch.Generator().manual_seed(5)
    values = torch.rand((rows, classes, *predicted.shape), generator=generator, dtype=torch.float64)
    values += torch.from_numpy(np.stack([predicted == index for index in range(classes)]))
    return values.requires_grad_()


def mask(*cells: tuple[int, int], shape: tuple[int, int] = (4, 8)) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Chosen pixels of an input of two pixels to the cell."""
    chosen = np.zeros(shape, dtype=np.bool_)
    for cell in cells:
        chosen[cell] = True
    return chosen


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        pytest.param(Predicted(), [(2, 4)], id="the class of most cells"),
        pytest.param(ClassIndex(0), [(0, 3)], id="class zero is a class"),
        pytest.param(KthClass(3), [(3, 1)], id="third"),
        pytest.param(TopClasses(2), [(2, 4), (0, 3)], id="largest areas"),
        pytest.param(TopClasses(4), [(2, 4), (0, 3), (3, 1)], id="those there are"),
        pytest.param(ClassesAbove(0.2), [(2, 4), (0, 3)], id="shares of the cells"),
        pytest.param(Difference(3, 1), [(3, 1)], id="cells of the class argued for"),
        pytest.param(Region(), [(2, 4)], id="any region"),
        pytest.param(PlacedRegion(), [(2, 4)], id="any placed region"),
        pytest.param(PlacedRegion(0), [(0, 3)], id="cells predicted as it"),
        pytest.param(PlacedRegion(cells=mask((0, 4), (1, 7), (3, 7))), [(0, 3)], id="the class of most chosen cells"),
        pytest.param(PlacedRegion(1, mask((3, 7))), [(1, 1)], id="another class's score at a pixel"),
        pytest.param(PlacedRegion(2, mask((0, 0), (0, 1), (1, 1))), [(2, 1)], id="pixels of one cell count once"),
        pytest.param(PlacedRegion(2, np.ones((2, 4), dtype=np.bool_)), [(2, 8)], id="an input as coarse as the output"),
        pytest.param(PlacedRegion(2, np.ones((1, 2), dtype=np.bool_)), [(2, 8)], id="an input coarser than the output"),
    ],
)
def test_targets_name_classes_and_cells(about: About, expected: list[tuple[int, int]]) -> None:
    """Largest first; the number of cells is told."""
    targets = [aim.target for aim in dense(logits_of()).aims(0, Target(about=about))]

    assert expected == [(one.class_index, one.cells) for one in targets]
    assert [(rank, len(expected)) for rank in range(len(expected))] == [(one.rank, one.count) for one in targets]


@pytest.mark.parametrize(
    ("about", "refusal", "message"),
    [
        (
            ClassIndex(1),
            InvalidRequest,
            "no cell is predicted as class 1; classes that are, largest first: 2, 0, 3; .*region",
        ),
        (KthClass(4), InvalidRequest, "no cell is predicted as class 1"),
        (ClassIndex(4), InvalidRequest, "class index 4 is out of range: the model has 4 classes"),
        (TopClasses(5), InvalidRequest, "k 5 is out of range"),
        (ClassesAbove(0.5), InvalidRequest, "no class's share of the cells is above 0.5: the largest is 0.5"),
        (PlacedRegion(cells=mask()), InvalidRequest, "chooses no pixel"),
        (PlacedRegion(7, mask((0, 0))), InvalidRequest, "class index 7 is out of range"),
        (PlacedRegion(cells=np.ones(8, dtype=np.bool_)), InvalidRequest, "has 1 axes, .* cells along 2"),
        (Difference(1, 0), InvalidRequest, "no cell is predicted as class 1"),
        (Embedding((1.0,)), Unsupported, "'embedding' does not fit .* segmentation; .*region"),
    ],
)
def test_what_cannot_be_summed_is_refused(about: About, refusal: type[CamserveError], message: str) -> None:
    """The refusal says what would work."""
    with pytest.raises(refusal, match=message):
        dense(logits_of()).aims(0, Target(about=about))


def test_a_score_is_that_of_pytorch_grad_cam() -> None:
    """The class's logits summed over the cells, value and gradient; a neighbour's other cells change nothing."""
    logits = logits_of(rows=2)
    found = dense(logits)
    (own,) = found.aims(0, Target())
    (other,) = found.aims(1, Target(about=PlacedRegion(1, mask((3, 7)))))
    theirs = SemanticSegmentationTarget(2, (PREDICTED == 2).astype(np.float64))(logits[0])
    (expected,) = torch.autograd.grad(theirs, logits)
    gradients = [torch.autograd.grad(found.scores([own, neighbour]).sum(), logits)[0] for neighbour in (None, other)]

    assert expected.equal(gradients[0])
    assert expected[0].equal(gradients[1][0])
    assert theirs.item() == pytest.approx(own.target.value, rel=1e-12)


@pytest.mark.parametrize("score", [Score.SOFTMAX, Score.REST])
def test_probabilities_are_over_the_classes_of_each_cell(score: Score) -> None:
    """The score of each cell is its own softmax, then they are summed; polarity turns the sum."""
    logits = logits_of()
    found = dense(logits)
    (aim,) = found.aims(0, Target(score=score, polarity=Polarity.AGAINST))
    cells = torch.from_numpy(PREDICTED == 2)
    of_cells = logits[0, 2] + logits.log_softmax(1)[0, 2] if score is Score.REST else logits.softmax(1)[0, 2]

    assert of_cells[cells].sum().item() == pytest.approx(aim.target.value, rel=1e-12)
    assert -aim.target.value == pytest.approx(found.scores([aim]).item(), rel=1e-12)


def test_a_contrast_compares_the_classes_nearest_over_the_cells() -> None:
    """By probability it is pytorch-grad-cam's weighted target at each cell, summed."""
    logits = logits_of()
    found = dense(logits)
    (aim,) = found.aims(0, Target(), Contrast(classes=2, weight=1.0, by_probability=True))
    cells = logits[0][:, torch.from_numpy(PREDICTED == 2)]
    sums = cells.sum(1)
    nearest = [int(one) for one in (sums - sums[2]).abs().argsort() if int(one) != 2][:2]
    theirs = FinerWeightedTarget(2, nearest, 1.0)(cells.T).sum()

    assert theirs.item() == pytest.approx(aim.target.value, rel=1e-12)
    assert nearest[0] == aim.target.other_class_index


def test_one_class_rather_than_another() -> None:
    """Both summed over the cells of the first."""
    logits = logits_of()
    (aim,) = dense(logits).aims(0, Target(about=Difference(0, 2, 0.5)))
    cells = torch.from_numpy(PREDICTED == 0)

    assert (logits[0, 0] - 0.5 * logits[0, 2])[cells].sum().item() == pytest.approx(aim.target.value, rel=1e-12)
    assert 2 == aim.target.other_class_index


def test_readings_hold_mean_logits_and_shares() -> None:
    """A class's share is that of the cells predicted as it."""
    logits = logits_of()
    (reading,) = dense(logits).readings()

    assert [3 / 8, 0, 4 / 8, 1 / 8] == reading.probabilities.tolist()
    assert logits[0].flatten(1).mean(1).tolist() == pytest.approx(reading.scores.tolist(), rel=1e-6)


def test_one_channel_is_a_binary_segmentation() -> None:
    """A cell is predicted where its logit is above 0; its probability is a sigmoid."""
    logits = torch.tensor([[[[1.0, 0.0], [3.0, -1.0]]], [[[-1.0, -1.0], [-1.0, -1.0]]]], requires_grad=True)
    found = dense(logits)
    (aim,) = found.aims(0, Target(score=Score.SOFTMAX))
    (everywhere,) = found.aims(1, Target(about=PlacedRegion(cells=mask((0, 0)))))
    readings = found.readings()

    assert [0.5, 0.0] == [reading.probabilities.item() for reading in readings]
    assert (0, 2) == (aim.target.class_index, aim.target.cells)
    assert torch.tensor([1.0, 3.0]).sigmoid().sum().item() == pytest.approx(aim.target.value)
    assert (0, -1.0) == (everywhere.target.class_index, everywhere.target.value)
    with pytest.raises(InvalidRequest, match=r"no cell is predicted as class 0; .*: none"):
        found.aims(1, Target())
    with pytest.raises(Unsupported, match="no other classes; use grad-cam"):
        found.aims(0, Target(), Contrast(classes=3, weight=1.0))


def test_keys_tell_cells_apart() -> None:
    """The same class over other cells is another number; over the same ones it is the same."""
    found = dense(logits_of())
    keys = [
        found.aims(0, Target(about=about))[0].key
        for about in (
            Predicted(),
            ClassIndex(2),
            PlacedRegion(2, mask((0, 0), (0, 2), (2, 0), (2, 2))),
            PlacedRegion(2, mask((0, 0))),
        )
    ]

    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_an_aim_scores_other_inputs() -> None:
    """As many rows as wanted, over the cells it was made with; nothing is asked about their own prediction."""
    (aim,) = dense(logits_of()).aims(0, Target())
    others = torch.randn(3, 4, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    expected = [row[2][torch.from_numpy(PREDICTED == 2)].sum().item() for row in others]

    assert expected == pytest.approx(dense(others).scores([aim] * 3).tolist(), rel=1e-12)


def test_logits_that_are_not_finite_fail_the_row() -> None:
    """The other row keeps its aim, and the bad one is read."""
    logits = logits_of(rows=2).detach()
    logits[0, 0, 0, 0] = torch.nan
    found = dense(logits)

    with pytest.raises(ExecutionFailed, match="NaN or infinite"):
        found.aims(0, Target())
    assert 2 == found.aims(1, Target())[0].target.class_index
    assert 2 == len(found.readings())


@pytest.mark.parametrize("cells", [(6,), (2, 3), (2, 1, 3)])
def test_grids_have_one_to_three_axes(cells: tuple[int, ...]) -> None:
    """Half precision is widened."""
    logits = torch.zeros(1, 2, *cells, dtype=torch.float16, requires_grad=True)
    found = dense(logits)
    (aim,) = found.aims(
        0, Target(about=PlacedRegion(1, np.ones([2 * n for n in cells], dtype=np.bool_)), score=Score.SOFTMAX)
    )

    assert (6, 3.0) == (aim.target.cells, aim.target.value)
    assert torch.float32 == found.scores([aim]).dtype

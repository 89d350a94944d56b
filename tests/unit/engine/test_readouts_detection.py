from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from camserve.server.cam.methods import Contrast
from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.program import TapName
from camserve.server.engine.readouts import Readout, read
from camserve.server.errors import CamserveError, ExecutionFailed, InvalidRequest, NotFound, Unsupported
from camserve.server.jobs import (
    About,
    Box,
    ClassesAbove,
    ClassIndex,
    Difference,
    KthClass,
    OutputKind,
    PlacedBox,
    Polarity,
    Predicted,
    Score,
    Target,
    TopClasses,
)

BOXES = [[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [0.0, 0.0, 10.0, 20.0], [0.0, 0.0, 0.0, 0.0]]
LABELS = [3, 1, 3, 2]
SCORES = [0.5, 0.9, 0.75, 0.25]


def answer(scores: Tensor | None = None, places: slice = slice(None)) -> dict[str, Tensor]:
    """One row of four detections, in no order."""
    scores = torch.tensor(SCORES) if scores is None else scores
    return {"boxes": torch.tensor(BOXES)[places], "labels": torch.tensor(LABELS)[places], "scores": scores[places]}


def detections(*answers: dict[str, Tensor]) -> Readout:
    """What a pass makes of a detector that returns these."""
    return read(OutputKind.DETECTION, list(answers), "", rows=len(answers), classes=0)


NONE = answer(places=slice(0))


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        pytest.param(Predicted(), [1], id="best"),
        pytest.param(KthClass(2), [2], id="second"),
        pytest.param(TopClasses(3), [1, 2, 0], id="best three"),
        pytest.param(TopClasses(9), [1, 2, 0, 3], id="those there are"),
        pytest.param(ClassIndex(3), [2], id="best of a class"),
        pytest.param(ClassesAbove(0.5), [1, 2], id="above a score"),
        pytest.param(PlacedBox(Box(1, 1, 9, 9)), [0], id="largest overlap"),
        pytest.param(PlacedBox(Box(0, 0, 10, 18), index=3), [2], id="largest overlap of a class"),
        pytest.param(PlacedBox(Box(0, 0, 10, 10), min_iou=1.0), [0], id="exactly"),
    ],
)
def test_targets_name_detections(about: About, expected: list[int]) -> None:
    """Best first; class, score and box are told."""
    targets = [aim.target for aim in detections(answer()).aims(0, Target(about=about))]

    assert [LABELS[place] for place in expected] == [one.class_index for one in targets]
    assert [SCORES[place] for place in expected] == pytest.approx([one.value for one in targets])
    boxes = [BOXES[place] for place in expected]
    assert [Box(left, top, right - left, bottom - top) for left, top, right, bottom in boxes] == [
        one.box for one in targets
    ]
    assert [(rank, len(expected)) for rank in range(len(expected))] == [(one.rank, one.count) for one in targets]


def test_the_overlap_with_the_box_asked_about_is_told() -> None:
    """Intersection over union."""
    (aim,) = detections(answer()).aims(0, Target(about=PlacedBox(Box(0, 0, 10, 18))))

    assert 0.9 == pytest.approx(aim.target.iou)


@pytest.mark.parametrize(
    ("row", "about", "refusal", "message"),
    [
        (NONE, Predicted(), NotFound, "detects nothing"),
        (NONE, ClassesAbove(0.1), NotFound, "detects nothing"),
        (NONE, PlacedBox(Box(0, 0, 1, 1)), NotFound, "detects nothing"),
        (answer(), KthClass(5), NotFound, "no detection 5: the model made 4"),
        (answer(), TopClasses(0), InvalidRequest, "k 0 is out of range"),
        (answer(), ClassIndex(7), NotFound, "no detection is of class 7; classes detected, best first: 1, 3, 2"),
        (answer(), ClassesAbove(0.95), InvalidRequest, "no detection's score is above 0.95: the largest is 0.9"),
        (
            answer(),
            PlacedBox(Box(5, 0, 10, 10)),
            NotFound,
            r"by 0.5 or more: the best overlap is 0.333; nearest of any class: class 3 at \(0.0, 0.0\) to \(10.0, 10.0\)",
        ),
        (
            answer(),
            PlacedBox(Box(0, 0, 10, 10), index=1),
            NotFound,
            "of class 1 overlaps .* best overlap is 0.000; nearest .* class 3",
        ),
        (answer(), PlacedBox(Box(0, 0, 10, 10), index=9), NotFound, "of class 9 overlaps .* best overlap is 0.000"),
        (answer(), Difference(1, 3), Unsupported, "'difference' does not fit .* detection; .* above, detection"),
    ],
)
def test_what_was_not_found_is_refused(
    row: dict[str, Tensor], about: About, refusal: type[CamserveError], message: str
) -> None:
    """The refusal says what the model did find."""
    with pytest.raises(refusal, match=message):
        detections(row).aims(0, Target(about=about))


def test_a_detection_has_one_score_and_no_neighbours() -> None:
    """Probabilities, ReST and contrasts need all classes' scores, which a detector keeps to itself."""
    with pytest.raises(Unsupported, match="score 'softmax' does not fit"):
        detections(answer()).aims(0, Target(score=Score.SOFTMAX))
    with pytest.raises(Unsupported, match="a detection has none; use grad-cam"):
        detections(answer()).aims(0, Target(), Contrast(classes=3, weight=1.0))


def test_each_row_is_scored_by_its_own_detection() -> None:
    """The gradient is that detection's alone; polarity turns it; rows without an aim or a detection have none."""
    scores = [torch.tensor(SCORES, requires_grad=True) for _ in range(3)]
    found = detections(*map(answer, scores), NONE)
    (best,) = found.aims(0, Target())
    (against,) = found.aims(1, Target(about=ClassIndex(3), polarity=Polarity.AGAINST))
    picked = found.scores([best, against, None, best])
    gradients = torch.autograd.grad(picked.sum(), scores)

    assert [0.9, -0.75, 0.0, 0.0] == pytest.approx(picked.tolist())
    assert [[0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 0]] == [gradient.tolist() for gradient in gradients]


def test_other_outputs_are_matched_anew() -> None:
    """The largest overlap times score among detections of the class; a better overlap of a worse detection loses."""
    (aim,) = detections(answer()).aims(0, Target(about=PlacedBox(Box(0, 0, 10, 10))))
    moved = torch.tensor([0.25, 1.0, 0.75, 1.0], requires_grad=True)
    other = detections(answer(moved.flip(0), slice(None, None)), answer(places=slice(1, 2)), NONE)
    elsewhere = {
        "boxes": torch.tensor([[0.0, 0.0, 10.0, 20.0], [0.0, 0.0, 10.0, 10.5]]),
        "labels": torch.tensor([3, 3]),
    }
    shifted = detections({**elsewhere, "scores": torch.tensor([0.8, 0.25])})

    assert [1.0, 0.0, 0.0] == pytest.approx(other.scores([aim] * 3).tolist())
    assert [0.4] == pytest.approx(shifted.scores([aim]).tolist())


def test_readings_hold_the_detections_best_first() -> None:
    """Of a row without any there is nothing."""
    found, empty = detections(answer(), NONE).readings()

    assert [1, 3, 3, 2] == [one.class_index for one in found.detections]
    assert () == empty.detections
    assert 0 == found.scores.size == found.probabilities.size


def test_keys_tell_detections_apart() -> None:
    """The best one by any name is the same."""
    found = detections(answer())
    keys = [
        found.aims(0, Target(about=about))[0].key for about in (Predicted(), ClassIndex(1), KthClass(1), KthClass(2))
    ]

    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_detections_that_are_not_finite_fail_the_row() -> None:
    """Boxes count too."""
    with pytest.raises(ExecutionFailed, match="NaN or infinite detections"):
        detections(answer(torch.tensor([0.5, torch.nan, 0.0, 0.0]))).aims(0, Target())


def test_rows_must_be_those_of_the_batch() -> None:
    """Neither outputs nor aims are cut off."""
    with pytest.raises(ExecutionFailed, match="1 rows for a batch of 2"):
        read(OutputKind.DETECTION, [answer()], "", rows=2, classes=0)
    with pytest.raises(ValueError, match="0 aims for a batch of 1 rows"):
        detections(answer()).scores([])


@pytest.fixture(scope="module")
def detector() -> EagerProgram:
    """A Faster R-CNN with random weights, which finds something everywhere."""
    torch.manual_seed(0)
    builder: Any = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    module = builder(
        weights=None,
        weights_backbone=None,
        num_classes=4,
        min_size=96,
        max_size=96,
        box_score_thresh=0.0,
        box_detections_per_img=5,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=20,
    )
    return EagerProgram(module, device=torch.device("cpu"))


def test_a_real_detectors_scores_reach_its_features(detector: EagerProgram) -> None:
    """The gradient at the backbone is each row's own, whatever the other row asks, and of the score alone."""
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    capture = detector.capture([TapName("backbone.body.16")], images)
    (features,) = capture.activations.values()
    found = read(OutputKind.DETECTION, capture.outputs, "", rows=2, classes=0)
    (best,) = found.aims(0, Target())
    (second,) = found.aims(1, Target(about=KthClass(2)))

    (together,) = torch.autograd.grad(found.scores([best, second]).sum(), features, retain_graph=True)
    (alone,) = torch.autograd.grad(found.scores([best, None]).sum(), features, retain_graph=True)
    direct = capture.outputs[0]["scores"]
    (expected,) = torch.autograd.grad(direct[int(direct.argmax())], features)

    assert expected.equal(alone)
    assert alone[0].any()
    assert alone[0].equal(together[0])
    assert together[1].any()
    assert not alone[1].any()
    assert np.isfinite(best.target.value)

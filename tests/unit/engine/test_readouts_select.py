import collections
from typing import Any

import pytest
import torch

from camserve.server.engine.readouts import select_detections, select_output
from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import OutputKind

TENSOR = torch.zeros(2, 3)
OTHER = torch.ones(2, 8)
DENSE = torch.zeros(2, 3, 4, 4)
Pair = collections.namedtuple("Pair", ["logits", "features"])  # noqa: PYI024 - as models return it
ANSWERS = [
    {"boxes": torch.zeros(n, 4), "labels": torch.zeros(n, dtype=torch.int64), "scores": torch.zeros(n)} for n in (0, 2)
]


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
    assert TENSOR is select_output(OutputKind.CLASSIFICATION, outputs, path)


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        (OutputKind.MULTI_LABEL, TENSOR),
        (OutputKind.EMBEDDING, TENSOR),
        (OutputKind.SEGMENTATION, DENSE[..., 0]),
        (OutputKind.SEGMENTATION, DENSE),
        (OutputKind.SEGMENTATION, DENSE[..., None]),
        (OutputKind.SEQUENCE, DENSE[..., 0]),
    ],
)
def test_each_kind_has_its_shapes(kind: OutputKind, tensor: torch.Tensor) -> None:
    """A dense output may have one to three axes of cells."""
    assert tensor is select_output(kind, {"out": tensor}, "")


C, S = OutputKind.CLASSIFICATION, OutputKind.SEGMENTATION


@pytest.mark.parametrize(
    ("kind", "outputs", "path", "message"),
    [
        pytest.param(C, (TENSOR, OTHER), "", "several tensors.*paths: 0, 1; name .* output.path", id="ambiguous"),
        pytest.param(
            C, {"aux": OTHER, "out": TENSOR}, "logits", "no tensor at 'logits'; paths: aux, out", id="unknown"
        ),
        pytest.param(
            S, {"out": DENSE, "aux": DENSE}, "", "several tensors.*paths: out, aux", id="torchvision segmentation"
        ),
        pytest.param(C, None, "", "holds no tensor; paths: none; return a tensor", id="nothing"),
        pytest.param(C, torch.zeros(2), "", r"shape \(2,\)", id="one number a row"),
        pytest.param(C, DENSE, "", r"shape \(2, 3, 4, 4\).*output.kind", id="dense"),
        pytest.param(C, torch.zeros(2, 3, dtype=torch.int64), "", "int64.*before any argmax", id="class numbers"),
        pytest.param(S, TENSOR, "", r"\(b, classes, \*cells\)", id="no cells"),
        pytest.param(OutputKind.SEQUENCE, TENSOR, "", r"\(b, steps, classes\)", id="no steps"),
    ],
)
def test_nothing_is_guessed_about_outputs(kind: OutputKind, outputs: Any, path: str, message: str) -> None:
    """What is not clearly of the model's kind is refused, with the paths that exist."""
    with pytest.raises(ExecutionFailed, match=message) as refused:
        select_output(kind, outputs, path)

    assert Reason.MODEL_FAILED == refused.value.reason


@pytest.mark.parametrize(
    ("outputs", "path"),
    [
        pytest.param(ANSWERS, "", id="torchvision"),
        pytest.param(({"loss": TENSOR}, ANSWERS), "", id="torchvision, scripted"),
        pytest.param({"coarse": ANSWERS[:1], "fine": ANSWERS}, "fine", id="by path"),
    ],
)
def test_detections_are_found_in_what_a_detector_returns(outputs: Any, path: str) -> None:
    """A list with boxes, labels and scores of each row."""
    assert ANSWERS is select_detections(outputs, path)


@pytest.mark.parametrize(
    ("outputs", "path", "message"),
    [
        pytest.param(TENSOR, "", "has no detections; paths of lists: none; a detector returns", id="tensor"),
        pytest.param((ANSWERS, ANSWERS), "", "several lists .* '0', '1'", id="ambiguous"),
        pytest.param(ANSWERS, "out", "no detections at 'out'; paths of lists: ''", id="unknown"),
        pytest.param([{**ANSWERS[1], "scores": torch.zeros(3)}], "", "has no detections", id="counts differ"),
        pytest.param([{"boxes": TENSOR}], "", "has no detections", id="no scores"),
    ],
)
def test_nothing_is_guessed_about_detections(outputs: Any, path: str, message: str) -> None:
    """What is not clearly a detector's answer is refused, with the lists that exist."""
    with pytest.raises(ExecutionFailed, match=message):
        select_detections(outputs, path)

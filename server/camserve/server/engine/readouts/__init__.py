"""How a model's outputs are read: a file for each kind of output, and `read`, which picks among them.

`readout.py` says what every kind offers. `passes.py` calls `read` with the outputs of a pass; the probe calls `select_output` and
`select_detections` alone.
"""

from __future__ import annotations

from typing import Any

from camserve.server.engine.readouts.classes import ClassReadout
from camserve.server.engine.readouts.dense import DenseReadout
from camserve.server.engine.readouts.detection import DetectionReadout
from camserve.server.engine.readouts.embedding import EmbeddingReadout
from camserve.server.engine.readouts.readout import Aim, Readout
from camserve.server.engine.readouts.select import select_detections, select_output
from camserve.server.engine.readouts.sequence import SequenceReadout
from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import OutputKind

__all__ = ["Aim", "Readout", "read", "select_detections", "select_output"]


def read(kind: OutputKind, outputs: Any, path: str, *, rows: int, classes: int) -> Readout:
    """Reads what one pass returned.

    Args:
        kind: of the model's output.
        outputs: as the model returned them.
        path: to what is read; see `select_output`.
        rows: of the batch.
        classes: channels of the output as the card tells them; 0 where that is not known yet. A detector's are not checked.

    Raises:
        ExecutionFailed: there is nothing of this kind at the path, or it has another number of rows or classes.
    """
    if kind is OutputKind.DETECTION:
        answers = select_detections(outputs, path)
        _check_rows(len(answers), rows)
        return DetectionReadout(answers)
    tensor = select_output(kind, outputs, path)
    _check_rows(tensor.shape[0], rows)
    found = tensor.shape[-1 if kind is OutputKind.SEQUENCE else 1]
    if classes and found != classes:
        raise _misfit(f"{found} classes, and its card says {classes}")
    match kind:
        case OutputKind.EMBEDDING:
            return EmbeddingReadout(tensor)
        case OutputKind.SEGMENTATION:
            return DenseReadout(tensor)
        case OutputKind.SEQUENCE:
            return SequenceReadout(tensor)
        case _:
            return ClassReadout(kind, tensor)


def _check_rows(found: int, rows: int) -> None:
    if found != rows:
        raise _misfit(f"{found} rows for a batch of {rows}")


def _misfit(problem: str) -> ExecutionFailed:
    return ExecutionFailed(Reason.MODEL_FAILED, f"the model's output has {problem}")

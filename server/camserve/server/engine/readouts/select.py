"""Finds what is read in whatever a model returned: one tensor, or a detector's lists of boxes, labels and scores.

`__init__.py` and the probe call these; nothing is guessed: what is not clearly of the model's kind is refused, with the paths
that exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import OutputKind

__all__ = ["select_detections", "select_output", "tensors_by_path"]

# What a tensor of each kind is, and what to do when it is not.
_SHAPES = {
    OutputKind.CLASSIFICATION: ("class logits are floating (b, classes)", "return the scores before any argmax"),
    OutputKind.MULTI_LABEL: ("class logits are floating (b, classes)", "return the scores before any threshold"),
    OutputKind.REGRESSION: ("values are floating (b, values) or (b)", "return the numbers themselves"),
    OutputKind.EMBEDDING: ("an embedding is floating (b, dimensions)", "return one vector for each row"),
    OutputKind.SEGMENTATION: (
        "segmentation logits are floating (b, classes, *cells) with 1 to 3 axes of cells",
        "return the scores before any argmax",
    ),
    OutputKind.SEQUENCE: (
        "a sequence's logits are floating (b, steps, classes)",
        "return the scores before any argmax",
    ),
}
_RANKS = {
    OutputKind.CLASSIFICATION: (2,),
    OutputKind.MULTI_LABEL: (2,),
    OutputKind.REGRESSION: (1, 2),
    OutputKind.EMBEDDING: (2,),
    OutputKind.SEGMENTATION: (3, 4, 5),
    OutputKind.SEQUENCE: (3,),
}
_DETECTION_KEYS = ("boxes", "labels", "scores")


def select_output(kind: OutputKind, outputs: Any, path: str) -> Tensor:
    """Finds the tensor that is read, for every kind but detection.

    Args:
        kind: what it must be.
        outputs: a tensor, or tensors nested in tuples, lists and mappings.
        path: keys and positions joined by dots, such as `logits` or `0.scores`; empty when there is only one tensor.

    Raises:
        ExecutionFailed: the path is empty and there are several tensors, it leads nowhere, or it leads to no tensor of this kind;
            the message lists the paths that exist and tells what to do.
    """
    found = tensors_by_path(outputs)
    if not path and len(found) == 1:
        (path,) = found
    wanted, advice = _SHAPES[kind]
    if path not in found:
        problem = "is several tensors, and the model's card names none of them" if found else "holds no tensor"
        problem = f"has no tensor at {path!r}" if path else problem
        remedy = "name the scores' path as output.path in model.toml" if found else f"return a tensor: {wanted}"
        raise _unusable(f"the model's output {problem}; paths: {', '.join(found) or 'none'}; {remedy}", path, found)
    tensor = found[path]
    if tensor.ndim not in _RANKS[kind] or not tensor.is_floating_point():
        raise _unusable(
            f"output {path!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; {wanted}; {advice}, or name another path as "
            "output.path, or the output's kind as output.kind, in model.toml",
            path,
            found,
        )
    return tensor[:, None] if tensor.ndim == 1 else tensor


def select_detections(outputs: Any, path: str) -> Sequence[Mapping[str, Tensor]]:
    """Finds a detector's answers: for each row boxes (n 4), labels (n) and scores (n).

    Args:
        outputs: a list of mappings as torchvision's detectors return it, the pair of losses and that list as they do when
            scripted, or either inside tuples and mappings.
        path: to the list; empty when there is only one.

    Raises:
        ExecutionFailed: there is none at the path, or several and no path; the message lists those there are.
    """
    found = _answers(outputs, "")
    if not path and len(found) == 1:
        return next(iter(found.values()))
    if path in found:
        return found[path]
    problem = (
        f"has no detections at {path!r}"
        if path
        else "has several lists of detections"
        if found
        else "has no detections"
    )
    places = ", ".join(repr(place) for place in found) or "none"
    raise _unusable(
        f"the model's output {problem}; paths of lists: {places}; a detector returns a list with a dict of boxes (n, 4), labels "
        "(n) and scores (n) for each row, as torchvision's do; name its path as output.path in model.toml",
        path,
        tensors_by_path(outputs),
    )


def tensors_by_path(outputs: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of a nested structure by its dotted path; the path of a bare tensor is empty."""
    if isinstance(outputs, Tensor):
        return {path: outputs}
    return {
        name: tensor for key, value in _items(outputs, path) for name, tensor in tensors_by_path(value, key).items()
    }


def _answers(outputs: Any, path: str) -> dict[str, Sequence[Mapping[str, Tensor]]]:
    if isinstance(outputs, list) and outputs and all(map(_is_answer, outputs)):
        return {path: outputs}
    return {name: answers for key, value in _items(outputs, path) for name, answers in _answers(value, key).items()}


def _is_answer(value: Any) -> bool:
    if not isinstance(value, Mapping) or any(not isinstance(value.get(key), Tensor) for key in _DETECTION_KEYS):
        return False
    boxes, labels, scores = (value[key] for key in _DETECTION_KEYS)
    return bool(
        boxes.ndim == 2
        and boxes.shape[1] == 4
        and labels.shape == scores.shape == boxes.shape[:1]
        and scores.is_floating_point()
        and labels.dtype in {torch.int64, torch.int32, torch.int16, torch.uint8}
    )


def _items(outputs: Any, path: str) -> list[tuple[str, Any]]:
    """What a container holds, by dotted path."""
    if isinstance(outputs, Mapping):
        items: list[tuple[object, Any]] = list(outputs.items())
    elif isinstance(outputs, tuple | list):
        items = list(zip(getattr(outputs, "_fields", range(len(outputs))), outputs, strict=True))
    else:
        return []
    below = f"{path}." if path else ""
    return [(f"{below}{key}", value) for key, value in items]


def _unusable(message: str, path: str, found: Mapping[str, Tensor]) -> ExecutionFailed:
    return ExecutionFailed(Reason.MODEL_FAILED, message, metadata={"outputPath": path, "paths": ", ".join(found)})

"""What is differentiated: from a model's outputs and a spec's target to classes, and from those to one number for each row.

`passes.py` calls these between the forward and the gradients: `select_output` finds the logits in whatever the model returned,
`resolve` turns a spec's target into classes once a row's logits are known, `scores` is the differentiable score of every row at
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.errors import ExecutionFailed, InvalidRequest, Reason
from camserve.server.jobs import ResolvedTarget, Score, Target, TargetKind

__all__ = ["resolve", "scores", "select_output"]


def select_output(outputs: Any, path: str) -> Float[Tensor, "b classes"]:
    """Finds the class logits in what a model returned.

    Args:
        outputs: a tensor, or tensors nested in tuples, lists and mappings.
        path: keys and positions joined by dots, such as `logits` or `0.scores`; empty when there is only one tensor.

    Raises:
        ExecutionFailed: the path is empty and there are several tensors, it leads nowhere, or it leads to no (b, classes);
            the message lists the paths that exist and tells what to do.
    """
    found = _tensors(outputs, "")
    if not path and len(found) == 1:
        (path,) = found
    if path not in found:
        wanted = "is several tensors, and the model's card names none of them" if found else "holds no tensor"
        wanted = f"has no tensor at {path!r}" if path else wanted
        advice = "name the scores' path as output.path in model.toml" if found else "return a tensor (b, classes)"
        raise _unusable(f"the model's output {wanted}; paths: {', '.join(found) or 'none'}; {advice}", path, found)
    logits = found[path]
    if logits.ndim != 2 or not logits.is_floating_point():
        shape = tuple(logits.shape)
        raise _unusable(
            f"output {path!r} is {logits.dtype} of shape {shape}; class logits are floating (b, classes); "
            "return the scores before any argmax, or name another path as output.path in model.toml",
            path,
            found,
        )
    return logits


def resolve(logits: npt.NDArray[np.floating[Any]], target: Target) -> tuple[ResolvedTarget, ...]:
    """Names the classes a target asks about, best first; of equal logits the lower index comes first.

    Args:
        logits: (classes), of one row.
        target: one class, except for TOP_K.

    Raises:
        InvalidRequest: the class or k is outside what the model has.
        ExecutionFailed: a logit is NaN or infinite, so that no class can be ranked or differentiated.
    """
    count = len(logits)
    if not np.isfinite(logits).all():
        raise ExecutionFailed(Reason.MODEL_FAILED, "the model returned NaN or infinite logits for this input")
    match target.kind:
        case TargetKind.CLASS_INDEX:
            _check("class index", target.value, range(count), count)
            chosen = [target.value]
        case TargetKind.PREDICTED:
            chosen = [int(logits.argmax())]
        case TargetKind.KTH:
            _check("k", target.value, range(1, count + 1), count)
            chosen = [_ranking(logits)[target.value - 1]]
        case TargetKind.TOP_K:
            _check("k", target.value, range(1, count + 1), count)
            chosen = _ranking(logits)[: target.value]
    values = _softmax(logits) if target.score is Score.SOFTMAX else logits
    return tuple(
        ResolvedTarget(class_index=index, score=target.score, value=float(values[index]), rank=rank, count=len(chosen))
        for rank, index in enumerate(chosen)
    )


def scores(logits: Float[Tensor, "b classes"], chosen: Sequence[ResolvedTarget | None]) -> Float[Tensor, "b"]:
    """The score of each row's class, differentiable; zero, with zero gradient, for rows without one.

    Whole-batch operations only, and each touches a row's own values alone: the gradient of a row has the same bits whatever the
    other rows ask for. Half formats are widened, so that a softmax near 0 or 1 keeps its derivative up to this point.

    Args:
        logits: of the whole batch.
        chosen: one entry for each row.
    """
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    index = torch.tensor([0 if one is None else one.class_index for one in chosen], device=wide.device)[:, None]
    picked = wide.gather(1, index)[:, 0]
    is_softmax = [one is not None and one.score is Score.SOFTMAX for one in chosen]
    if any(is_softmax):
        probability = wide.softmax(dim=1).gather(1, index)[:, 0]
        picked = torch.where(torch.tensor(is_softmax, device=wide.device), probability, picked)
    if None in chosen:
        picked = torch.where(torch.tensor([one is not None for one in chosen], device=wide.device), picked, 0)
    return picked


def _tensors(outputs: Any, path: str) -> dict[str, Tensor]:
    """Every tensor of a nested structure by its dotted path; the path of a bare tensor is empty."""
    if isinstance(outputs, Tensor):
        return {path: outputs}
    if isinstance(outputs, Mapping):
        items: list[tuple[object, Any]] = list(outputs.items())
    elif isinstance(outputs, tuple | list):
        items = list(zip(getattr(outputs, "_fields", range(len(outputs))), outputs, strict=True))
    else:
        return {}
    below = f"{path}." if path else ""
    return {name: tensor for key, value in items for name, tensor in _tensors(value, f"{below}{key}").items()}


def _ranking(logits: npt.NDArray[np.floating[Any]]) -> list[int]:
    return [int(index) for index in np.argsort(-logits, kind="stable")]


def _softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    exponentials = np.exp(logits.astype(np.float64) - float(logits.max()))
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities


def _check(what: str, value: int, allowed: range, classes: int) -> None:
    if value not in allowed:
        raise InvalidRequest(
            Reason.CLASS_OUT_OF_RANGE,
            f"{what} {value} is out of range: the model has {classes} classes, so it must be {allowed[0]} to {allowed[-1]}",
            metadata={"value": value, "classes": classes},
        )


def _unusable(message: str, path: str, found: Mapping[str, Tensor]) -> ExecutionFailed:
    return ExecutionFailed(Reason.MODEL_FAILED, message, metadata={"outputPath": path, "paths": ", ".join(found)})

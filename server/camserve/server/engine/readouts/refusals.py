"""The refusals that several kinds of output share: one wording for each, whatever the kind."""

from __future__ import annotations

from collections.abc import Collection

from camserve.server.errors import ExecutionFailed, InvalidRequest, Reason, Unsupported
from camserve.server.jobs import About, OutputKind, Score

__all__ = ["check_class", "check_count", "no_contrast", "no_score", "no_target", "not_finite"]

# How targets are called in requests.
_NAMES = {
    "Predicted": "predicted",
    "ClassIndex": "class_index",
    "KthClass": "kth",
    "TopClasses": "top",
    "ClassesAbove": "above",
    "Difference": "difference",
    "Embedding": "embedding",
    "Reference": "embedding",
    "ReferenceTensor": "embedding",
    "Phrase": "text",
    "Region": "region",
    "PlacedRegion": "region",
    "DetectionBox": "detection",
    "PlacedBox": "detection",
    "Steps": "steps",
}


def no_target(kind: OutputKind, about: About, offered: Collection[str]) -> Unsupported:
    """This kind of output has no such target."""
    name = _NAMES[type(about).__name__]
    known = ", ".join(offered)
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"target {name!r} does not fit a model whose output is {kind.value}; it can be asked about: {known}",
        metadata={"target": name, "outputKind": kind.value, "known": known},
    )


def no_score(kind: OutputKind, score: Score, offered: Collection[Score]) -> Unsupported:
    """This kind of output has no such number."""
    known = ", ".join(offered)
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"score {score.value!r} does not fit a model whose output is {kind.value}; it has: {known}",
        metadata={"score": score.value, "outputKind": kind.value, "known": known},
    )


def no_contrast(kind: OutputKind, why: str) -> Unsupported:
    """The target cannot be turned into a contrast with its nearest classes."""
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"finer-cam compares a class with those nearest to it in score, and {why}; use grad-cam",
        metadata={"outputKind": kind.value, "instead": "grad-cam"},
    )


def not_finite(what: str) -> ExecutionFailed:
    """There is nothing to rank or to differentiate."""
    return ExecutionFailed(Reason.MODEL_FAILED, f"the model returned NaN or infinite {what} for this input")


def check_class(index: int, classes: int, *, what: str = "class index") -> None:
    """Refuses an index that is not one of the model's classes.

    Raises:
        InvalidRequest: it is not.
    """
    _check(what, index, range(classes), classes)


def check_count(k: int, classes: int) -> None:
    """Refuses a k that is more than there are classes, or none.

    Raises:
        InvalidRequest: it is.
    """
    _check("k", k, range(1, classes + 1), classes)


def _check(what: str, value: int, allowed: range, classes: int) -> None:
    if value not in allowed:
        raise InvalidRequest(
            Reason.CLASS_OUT_OF_RANGE,
            f"{what} {value} is out of range: the model has {classes} classes, so it must be {allowed[0]} to {allowed[-1]}",
            metadata={"value": value, "classes": classes},
        )

"""Which targets a model's kind of output has, and which classes, places and phrases of it exist.

`validate.py` calls `check_target` on the event loop, before anything is decoded or run. What only a pass can tell (whether a
class is above a threshold, a detection matches, a step exists) is left to the engine's readouts, whose lists these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from camserve.server import jobs
from camserve.server.errors import CamserveError, InvalidRequest, NotFound, Reason, Unsupported
from camserve.server.jobs import OutputKind, Score
from camserve.server.models.card import ModelCard

__all__ = ["check_target"]

_NAMES: Mapping[type[jobs.About], str] = MappingProxyType(
    {
        jobs.Predicted: "predicted",
        jobs.ClassIndex: "class_index",
        jobs.KthClass: "kth",
        jobs.TopClasses: "top",
        jobs.ClassesAbove: "above",
        jobs.Difference: "difference",
        jobs.Region: "region",
        jobs.DetectionBox: "detection",
        jobs.Embedding: "embedding",
        jobs.Reference: "embedding",
        jobs.Phrase: "text",
        jobs.Steps: "steps",
    }
)
_CLASSES = ("predicted", "class_index", "kth", "top", "above", "difference")
_OFFERED: Mapping[OutputKind, tuple[str, ...]] = MappingProxyType(
    {
        OutputKind.CLASSIFICATION: _CLASSES,
        OutputKind.MULTI_LABEL: _CLASSES,
        OutputKind.REGRESSION: tuple(name for name in _CLASSES if name != "above"),
        OutputKind.SEGMENTATION: (*_CLASSES, "region"),
        OutputKind.DETECTION: ("predicted", "class_index", "kth", "top", "above", "detection"),
        OutputKind.EMBEDDING: ("embedding", "text"),
        OutputKind.SEQUENCE: ("predicted", "steps"),
    }
)
# Where nothing is a probability.
_PLAIN = frozenset({OutputKind.REGRESSION, OutputKind.DETECTION, OutputKind.EMBEDDING})


def check_target(target: jobs.Target, card: ModelCard, field: str) -> int:
    """Refuses a target that the model does not have.

    Args:
        target: of a method that depends on one.
        card: of the model.
        field: path of the target in the request.

    Returns:
        The most maps it can give.

    Raises:
        Unsupported: this kind of output has no such target or score; the message lists those it has.
        InvalidRequest: a class or k is out of range, or a vector has other dimensions.
        NotFound: the card holds no such phrase.
    """
    name = _NAMES[type(target.about)]
    offered = _OFFERED[card.output_kind]
    if name not in offered:
        raise _unfit("target", name, ", ".join(offered), card, f"{field}.{name}")
    if target.score is not Score.LOGIT and card.output_kind in _PLAIN:
        raise _unfit("score", target.score, Score.LOGIT, card, f"{field}.score")
    _check_about(target.about, card, f"{field}.{name}")
    return _most_maps(target.about, card)


def _check_about(about: jobs.About, card: ModelCard, field: str) -> None:
    match about:
        case jobs.ClassIndex(index):
            _check_class(index, card, field)
        case jobs.KthClass(k) | jobs.TopClasses(k):
            _check_k(k, card, f"{field}.k")
        case jobs.Difference(index, other):
            _check_class(index, card, f"{field}.class_index")
            _check_class(other, card, f"{field}.other_class_index")
        case jobs.Region(index=index) | jobs.DetectionBox(index=index) if index is not None:
            _check_class(index, card, f"{field}.class_index")
        case jobs.Embedding(vector) if len(vector) != card.class_count:
            raise _other_dimensions(len(vector), card, f"{field}.vector")
        case jobs.Phrase(text) if text not in card.phrases:
            raise _no_phrase(text, card, field)
        case jobs.Steps(classes):
            for place, index in enumerate(classes):
                _check_class(index, card, f"{field}.class_indices[{place}]")


def _most_maps(about: jobs.About, card: ModelCard) -> int:
    match about:
        case jobs.TopClasses(k):
            return k
        case jobs.ClassesAbove(probability):
            return _most_above(probability, card)
        case jobs.Steps(classes, _, count):
            # Without a count the model's own length decides, which only a pass tells.
            return count or max(len(classes), 1)
    return 1


def _most_above(probability: float, card: ModelCard) -> int:
    """How many classes can be above a threshold: shares of one whole, unless each class is a question of its own."""
    if card.output_kind is OutputKind.DETECTION:
        return 1  # How many objects there are only a pass tells.
    if card.output_kind is OutputKind.MULTI_LABEL or probability <= 0:
        return card.class_count
    return min(card.class_count, max(math.ceil(1 / probability) - 1, 1))


def _check_class(index: int, card: ModelCard, field: str) -> None:
    # A detector need not know how many classes it has.
    if index < 0 or (index >= card.class_count and (card.class_count or card.output_kind is not OutputKind.DETECTION)):
        raise _out_of_range(field, index, 0, card.class_count - 1, card)


def _check_k(k: int, card: ModelCard, field: str) -> None:
    if card.output_kind is OutputKind.DETECTION:
        # The k best detections; how many there are, the image decides.
        if k < 1:
            raise InvalidRequest(Reason.FIELD_INVALID, f"{field} must be at least 1, is {k}", field=field)
    elif not 1 <= k <= card.class_count:
        raise _out_of_range(field, k, 1, card.class_count, card)


def _out_of_range(field: str, value: int, low: int, high: int, card: ModelCard) -> InvalidRequest:
    return InvalidRequest(
        Reason.CLASS_OUT_OF_RANGE,
        f"{field} must be from {low} to {high} for model {card.name!r} with {card.class_count} classes, is {value}",
        field=field,
        metadata={"value": value, "lowest": low, "highest": high, "model": card.name},
    )


def _other_dimensions(sent: int, card: ModelCard, field: str) -> InvalidRequest:
    return InvalidRequest(
        Reason.FIELD_INVALID,
        f"{field} has {sent} numbers; embeddings of model {card.name!r} have {card.class_count}",
        field=field,
        metadata={"dimensions": sent, "expected": card.class_count, "model": card.name},
    )


def _unfit(what: str, asked: str, offered: str, card: ModelCard, field: str) -> Unsupported:
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"{what} '{asked}' does not fit model {card.name!r}, whose output is {card.output_kind}; it has: {offered}",
        field=field,
        metadata={what: asked, "outputKind": card.output_kind, "known": offered, "model": card.name},
    )


def _no_phrase(text: str, card: ModelCard, field: str) -> CamserveError:
    shown = ", ".join(map(repr, card.phrases[:20])) + (" …" if len(card.phrases) > 20 else "")
    return NotFound(
        Reason.LABEL_NOT_FOUND,
        f"phrase {text!r} is not on the card of model {card.name!r}; "
        + (f"its phrases are: {shown}" if card.phrases else "it holds none: send the phrase's embedding as a vector"),
        field=field,
        metadata={"label": text, "model": card.name},
    )

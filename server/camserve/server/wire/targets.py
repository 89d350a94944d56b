"""`Target` messages to `jobs.Target`: which scalar is asked about, with class labels turned into indices by the model's card.

Called by `specs.py`. Only the grammar is looked at here: what the model has is `validate.py`'s business, and where a region lies
that of `placement.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeVar

from camserve.server import jobs
from camserve.server.errors import InvalidRequest, NotFound, Reason
from camserve.server.models.card import ModelCard
from camserve.server.wire import words
from camserve.server.wire.fields import at_least, finite, invalid, open_share, share
from camserve.server.wire.inputs import read_box, read_tensor
from camserve.v1 import spec_pb2

__all__ = ["read_target"]

# No embedding has as many dimensions and no sequence as many steps; a message could hold millions, and this is the event loop.
_MOST_NUMBERS: Final = 65_536

_Number = TypeVar("_Number", int, float)


def read_target(target: spec_pb2.Target, card: ModelCard, field: str) -> jobs.Target:
    """What a spec asks about.

    Args:
        target: as it came; unset asks about the predicted class.
        card: for its labels.
        field: path of the target in the request.

    Raises:
        InvalidRequest: a field is missing or wrong.
        NotFound: the model has no class of that label.
    """
    kind = target.WhichOneof("kind") or "predicted"
    return jobs.Target(
        about=_KINDS[kind](target, card, f"{field}.{kind}"),
        score=words.word(words.SCORES, target.score, f"{field}.score"),
        polarity=words.word(words.POLARITIES, target.polarity, f"{field}.polarity"),
        output_path=target.output_path,
    )


def _predicted(_target: spec_pb2.Target, _card: ModelCard, _field: str) -> jobs.About:
    return jobs.Predicted()


def _class_index(target: spec_pb2.Target, _card: ModelCard, _field: str) -> jobs.About:
    return jobs.ClassIndex(target.class_index)


def _class_label(target: spec_pb2.Target, card: ModelCard, field: str) -> jobs.About:
    return jobs.ClassIndex(_label_index(target.class_label, card, field))


def _kth(target: spec_pb2.Target, _card: ModelCard, _field: str) -> jobs.About:
    return jobs.KthClass(target.kth.k)


def _top(target: spec_pb2.Target, _card: ModelCard, _field: str) -> jobs.About:
    return jobs.TopClasses(target.top.k)


def _above(target: spec_pb2.Target, _card: ModelCard, field: str) -> jobs.About:
    return jobs.ClassesAbove(share(target.above.probability, f"{field}.probability"))


def _region(target: spec_pb2.Target, _card: ModelCard, field: str) -> jobs.About:
    region = target.region
    pixels: jobs.Box | jobs.Mask | jobs.Point | None = None
    match region.WhichOneof("pixels"):
        case "box":
            pixels = read_box(region.box, f"{field}.box")
        case "mask":
            pixels = _mask(region.mask, f"{field}.mask")
        case "point":
            pixels = jobs.Point(
                finite(region.point.x_pixels, f"{field}.point.x_pixels"),
                finite(region.point.y_pixels, f"{field}.point.y_pixels"),
            )
    return jobs.Region(index=region.class_index if region.HasField("class_index") else None, pixels=pixels)


def _mask(mask: spec_pb2.Mask, field: str) -> jobs.Mask:
    if not mask.shape:
        raise invalid(f"{field}.shape", "is required: height and width of the source, or a tensor's spatial axes")
    for place, size in enumerate(mask.shape):
        at_least(1, size, f"{field}.shape[{place}]")
    needed = math.prod(mask.shape)
    if len(mask.data) != needed:
        sizes = " x ".join(map(str, mask.shape))
        raise invalid(
            f"{field}.data", f"must hold one byte for each of {sizes} pixels, {needed}; it holds {len(mask.data)}"
        )
    # Looked at by C: a mask may be as large as a photograph, and this is the event loop.
    if mask.data.count(0) == needed:
        raise invalid(f"{field}.data", "chooses no pixel; any byte but 0 chooses one")
    return jobs.Mask(tuple(mask.shape), mask.data)


def _detection(target: spec_pb2.Target, _card: ModelCard, field: str) -> jobs.About:
    wanted = target.detection
    if not wanted.HasField("box"):
        raise invalid(f"{field}.box", "is required: where the object is, in source pixels")
    return jobs.DetectionBox(
        read_box(wanted.box, f"{field}.box"),
        wanted.class_index if wanted.HasField("class_index") else None,
        open_share(wanted.min_iou, f"{field}.min_iou") if wanted.HasField("min_iou") else 0.5,
    )


def _difference(target: spec_pb2.Target, _card: ModelCard, field: str) -> jobs.About:
    asked = target.difference
    if asked.class_index == asked.other_class_index:
        raise invalid(f"{field}.other_class_index", f"must be another class than class_index, {asked.class_index}")
    weight = finite(asked.weight, f"{field}.weight") if asked.HasField("weight") else 1.0
    return jobs.Difference(asked.class_index, asked.other_class_index, weight)


def _embedding(target: spec_pb2.Target, _card: ModelCard, field: str) -> jobs.About:
    other = target.embedding
    match other.WhichOneof("other"):
        case "vector":
            vector = tuple(_bounded(other.vector.values, f"{field}.vector.values"))
            if not any(vector):
                raise invalid(f"{field}.vector.values", "must hold a number other than 0: a cosine needs a direction")
            for place, value in enumerate(vector):
                finite(value, f"{field}.vector.values[{place}]")
            return jobs.Embedding(vector)
        case "image":
            return jobs.Reference(jobs.EncodedImage(data=other.image.data))
        case "tensor":
            return jobs.Reference(read_tensor(other.tensor, f"{field}.tensor"))
        case _:
            raise invalid(field, "needs a vector, an image or a tensor to be compared with")


def _text(target: spec_pb2.Target, _card: ModelCard, _field: str) -> jobs.About:
    return jobs.Phrase(target.text)


def _steps(target: spec_pb2.Target, _card: ModelCard, field: str) -> jobs.About:
    steps = target.steps
    given = _bounded(steps.class_indices, f"{field}.class_indices")
    classes = tuple(at_least(0, index, f"{field}.class_indices[{place}]") for place, index in enumerate(given))
    first = at_least(0, steps.first, f"{field}.first")
    count = at_least(1, steps.count, f"{field}.count") if steps.HasField("count") else None
    if classes and count not in (None, len(classes)):
        raise invalid(f"{field}.count", f"is {count}, but {len(classes)} classes are given; leave it unset")
    return jobs.Steps(classes, first, count)


def _bounded(values: Sequence[_Number], field: str) -> Sequence[_Number]:
    if len(values) > _MOST_NUMBERS:
        raise invalid(field, f"must hold at most {_MOST_NUMBERS} numbers, holds {len(values)}")
    return values


_KINDS: Mapping[str, Callable[[spec_pb2.Target, ModelCard, str], jobs.About]] = MappingProxyType(
    {
        "predicted": _predicted,
        "class_index": _class_index,
        "class_label": _class_label,
        "kth": _kth,
        "top": _top,
        "above": _above,
        "region": _region,
        "detection": _detection,
        "difference": _difference,
        "embedding": _embedding,
        "text": _text,
        "steps": _steps,
    }
)


def _label_index(label: str, card: ModelCard, field: str) -> int:
    found = [index for index, known in enumerate(card.labels) if known == label]
    if len(found) > 1:
        indices = ", ".join(map(str, found))
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"label {label!r} names several classes of model {card.name!r}: {indices}; use class_index",
            field=field,
            metadata={"label": label, "model": card.name, "classIndices": indices},
        )
    if found:
        return found[0]
    if not card.labels:
        said = "its card has no labels; use class_index"
    else:
        shown = ", ".join(card.labels[:20]) + (" …" if len(card.labels) > 20 else "")
        said = f"its labels are: {shown}"
    raise NotFound(
        Reason.LABEL_NOT_FOUND,
        f"label {label!r} is not one of model {card.name!r}; {said}",
        field=field,
        metadata={"label": label, "model": card.name},
    )

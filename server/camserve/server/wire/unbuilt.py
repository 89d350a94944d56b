"""What the contract offers and this version does not do yet, in one list.

`requests.py` asks `refuse_unbuilt` before anything else, so that an option is never silently ignored: the caller gets
UNIMPLEMENTED with the field's path. A test walks the list and keeps it true; shortening it is progress.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from camserve.server.cam.methods import METHODS
from camserve.server.errors import Reason, Unsupported
from camserve.server.wire import words
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import spec_pb2

__all__ = ["UNBUILT_REQUEST", "UNBUILT_SPEC", "Unbuilt", "refuse_unbuilt", "unbuilt_methods"]


@dataclasses.dataclass(frozen=True, slots=True)
class Unbuilt:
    """An option of a message that is not built yet.

    Attributes:
        field: its path below the message.
        instead: what the caller can do today.
        is_asked: whether a message asks for it.
    """

    field: str
    instead: str
    is_asked: Callable[..., bool]


def _target_is(kind: str) -> Callable[[spec_pb2.Spec], bool]:
    return lambda spec: spec.target.WhichOneof("kind") == kind


UNBUILT_REQUEST: tuple[Unbuilt, ...] = (
    Unbuilt("extra_inputs", "serve a model with one input", lambda request: bool(request.extra_inputs)),
    Unbuilt(
        "region_of_interest", "crop the image before sending", lambda request: request.HasField("region_of_interest")
    ),
    Unbuilt(
        "lane",
        "leave it unset: every request is in the standard lane",
        lambda request: request.lane not in (service_pb2.LANE_UNSPECIFIED, service_pb2.LANE_STANDARD),
    ),
)
_CLASS_TARGETS = "ask about a class: predicted, class_index, class_label, kth or top"
UNBUILT_SPEC: tuple[Unbuilt, ...] = (
    *(
        Unbuilt(f"target.{kind}", _CLASS_TARGETS, _target_is(kind))
        for kind in ("above", "region", "detection", "difference", "embedding", "text")
    ),
    Unbuilt("target.score", "use SCORE_LOGIT or SCORE_SOFTMAX", lambda spec: spec.target.score == spec_pb2.SCORE_REST),
    Unbuilt(
        "target.polarity",
        "ask for evidence for the class; rectify=false keeps both signs in the map",
        lambda spec: spec.target.polarity not in (spec_pb2.POLARITY_UNSPECIFIED, spec_pb2.POLARITY_FOR),
    ),
    Unbuilt(
        "target.output_path",
        "set output.path on the model card",
        lambda spec: spec.target.HasField("output_path"),
    ),
    Unbuilt("smoothing", "leave it unset", lambda spec: spec.HasField("smoothing")),
    Unbuilt("budget", "leave it unset: no amplified method is built yet", lambda spec: spec.HasField("budget")),
    Unbuilt("regions", "threshold the map on the client", lambda spec: spec.HasField("regions")),
)


def unbuilt_methods() -> Iterator[str]:
    """Slugs of the methods the contract names and this version lacks."""
    return (slug for slug in words.METHODS.values() if slug not in METHODS)


def refuse_unbuilt(request: service_pb2.ExplainRequest) -> None:
    """Raises if the request asks for anything not built yet.

    Raises:
        Unsupported: with reason METHOD_NOT_IMPLEMENTED or FEATURE_NOT_IMPLEMENTED and the field's path.
    """
    for option in UNBUILT_REQUEST:
        if option.is_asked(request):
            raise _refusal(option, option.field)
    for index, spec in enumerate(request.specs):
        slug = words.METHODS.get(spec.method)
        if slug is not None and slug not in METHODS:
            raise Unsupported(
                Reason.METHOD_NOT_IMPLEMENTED,
                f"method {slug} is not built yet; built are: {', '.join(METHODS)}",
                field=f"specs[{index}].method",
                metadata={"method": slug},
            )
        for option in UNBUILT_SPEC:
            if option.is_asked(spec):
                raise _refusal(option, f"specs[{index}].{option.field}")


def _refusal(option: Unbuilt, field: str) -> Unsupported:
    return Unsupported(
        Reason.FEATURE_NOT_IMPLEMENTED,
        f"{field} is not built yet; {option.instead}",
        field=field,
        metadata={"feature": option.field},
    )

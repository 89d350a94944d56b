"""ExplainRequest to `Job`: the grammar only. What the model allows is looked at by `validate.py`.

Called by `service.py` on the event loop; raises with the path of the field at fault.
"""

from __future__ import annotations

import math
import uuid

from google.protobuf import duration_pb2

from camserve.server import jobs
from camserve.server.errors import DeadlineExceeded, Reason
from camserve.server.models.card import ModelCard
from camserve.server.wire import words
from camserve.server.wire.fields import at_least, invalid
from camserve.server.wire.inputs import read_box, read_payload, read_tensor
from camserve.server.wire.specs import read_spec
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import input_pb2

__all__ = ["job_from_request", "request_id_of"]

DEFAULT_TOP_K = 5
LONGEST_REQUEST_ID = 128


def request_id_of(request: service_pb2.ExplainRequest) -> str:
    """The caller's request id, or a new one.

    Raises:
        InvalidRequest: longer than 128 characters, or not printable ASCII.
    """
    given = request.request_id
    if not given:
        return uuid.uuid4().hex
    if len(given) > LONGEST_REQUEST_ID or not (given.isascii() and given.isprintable()):
        raise invalid(
            "request_id", f"must be at most {LONGEST_REQUEST_ID} printable ASCII characters, has {len(given)}"
        )
    return given


def job_from_request(
    request: service_pb2.ExplainRequest,
    card: ModelCard,
    *,
    request_id: str,
    received_at: float,
    deadline: float | None,
    caller: str,
) -> jobs.Job:
    """Reads a request.

    Args:
        request: as it came.
        card: of the model it names.
        request_id: from `request_id_of`.
        received_at: monotonic seconds.
        deadline: gRPC's own, monotonic seconds; the request's may shorten it.
        caller: who asks.

    Raises:
        CamserveError: a field is missing, wrong, or asks for what is not built.
    """
    if request.HasField("deadline"):
        deadline = _deadline(request.deadline, received_at, deadline)
    return jobs.Job(
        request_id=request_id,
        model=card.name,
        version=card.version,
        payload=read_payload(request),
        specs=tuple(read_spec(index, spec, card) for index, spec in enumerate(request.specs)),
        top_k=request.top_k if request.HasField("top_k") else _default_top_k(card),
        received_at=received_at,
        deadline=deadline,
        labels=dict(request.labels),
        caller=caller,
        extra_inputs={
            name: read_tensor(tensor, f"extra_inputs[{name}]") for name, tensor in request.extra_inputs.items()
        },
        region_of_interest=_region_of_interest(request.region_of_interest)
        if request.HasField("region_of_interest")
        else None,
        lane=words.word(words.LANES, request.lane, "lane"),
    )


def _deadline(message: duration_pb2.Duration, received_at: float, deadline: float | None) -> float:
    seconds = message.seconds + message.nanos / 1e9
    if seconds <= 0:
        raise DeadlineExceeded(
            Reason.DEADLINE_EXCEEDED,
            f"the deadline was over on arrival: {seconds} s; send a positive duration",
            field="deadline",
            metadata={"deadlineSeconds": seconds},
        )
    return min(received_at + seconds, math.inf if deadline is None else deadline)


def _default_top_k(card: ModelCard) -> int:
    """Five classes, or all if the model has fewer; a detector lists as many objects, whatever its classes."""
    if card.output_kind in (jobs.OutputKind.DETECTION, jobs.OutputKind.EMBEDDING):
        return DEFAULT_TOP_K
    return min(DEFAULT_TOP_K, card.class_count)


def _region_of_interest(box: input_pb2.Box) -> jobs.Box:
    at_least(0, box.left_pixels, "region_of_interest.left_pixels")
    at_least(0, box.top_pixels, "region_of_interest.top_pixels")
    return read_box(box, "region_of_interest")

"""ExplainRequest to `Job`: the grammar only. What the model allows is looked at by `validate.py`.

Called by `service.py` on the event loop; raises with the path of the field at fault.
"""

from __future__ import annotations

import math
import uuid

from camserve.server import jobs
from camserve.server.errors import DeadlineExceeded, InvalidRequest, NotFound, Reason
from camserve.server.models.card import ModelCard
from camserve.server.wire import words
from camserve.server.wire.unbuilt import refuse_unbuilt
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import input_pb2, spec_pb2

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
        raise _invalid(
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
    refuse_unbuilt(request)
    if request.HasField("deadline"):
        seconds = request.deadline.seconds + request.deadline.nanos / 1e9
        if seconds <= 0:
            raise DeadlineExceeded(
                Reason.DEADLINE_EXCEEDED,
                f"the deadline was over on arrival: {seconds} s; send a positive duration",
                field="deadline",
                metadata={"deadlineSeconds": seconds},
            )
        deadline = min(received_at + seconds, math.inf if deadline is None else deadline)
    top_k = request.top_k if request.HasField("top_k") else min(DEFAULT_TOP_K, card.class_count)
    return jobs.Job(
        request_id=request_id,
        model=card.name,
        version=card.version,
        payload=_payload(request),
        specs=tuple(_spec(index, spec, card) for index, spec in enumerate(request.specs)),
        top_k=top_k,
        received_at=received_at,
        deadline=deadline,
        labels=dict(request.labels),
        caller=caller,
    )


def _payload(request: service_pb2.ExplainRequest) -> jobs.JobInput:
    match request.WhichOneof("input"):
        case "image":
            return jobs.EncodedImage(data=request.image.data)
        case "frame":
            return _frame(request.frame)
        case "tensor":
            return jobs.TensorInput(
                dtype=words.word(words.DATA_TYPES, request.tensor.data_type, "tensor.data_type"),
                shape=tuple(request.tensor.shape),
                data=request.tensor.data,
            )
        case _:
            raise _invalid("input", "is required; send image, frame or tensor")


def _frame(frame: input_pb2.RawFrame) -> jobs.RawFrame:
    pixel_format = words.word(words.PIXEL_FORMATS, frame.pixel_format, "frame.pixel_format")
    bytes_a_pixel = {jobs.PixelFormat.MONO16: 2, jobs.PixelFormat.RGB8: 3, jobs.PixelFormat.BGR8: 3}.get(
        pixel_format, 1
    )
    for name, value in (("width_pixels", frame.width_pixels), ("height_pixels", frame.height_pixels)):
        if value < 1:
            raise _invalid(f"frame.{name}", f"must be at least 1, is {value}")
    row = frame.width_pixels * bytes_a_pixel
    stride = frame.stride_bytes if frame.HasField("stride_bytes") else row
    if stride < row:
        raise _invalid("frame.stride_bytes", f"is {stride}, but a row alone takes {row} bytes")
    return jobs.RawFrame(
        pixel_format=pixel_format, width=frame.width_pixels, height=frame.height_pixels, stride=stride, data=frame.data
    )


def _spec(index: int, spec: spec_pb2.Spec, card: ModelCard) -> jobs.Spec:
    field = f"specs[{index}]"
    opacity = spec.overlay_opacity if spec.HasField("overlay_opacity") else 0.5
    if not 0 <= opacity <= 1:
        raise _invalid(f"{field}.overlay_opacity", f"must be from 0 to 1, is {opacity}")
    encoding = words.word(words.ENCODINGS, spec.encoding, f"{field}.encoding")
    size = words.word(words.SIZES, spec.size, f"{field}.size")
    if encoding.startswith("overlay"):
        if spec.size not in (spec_pb2.MAP_SIZE_UNSPECIFIED, spec_pb2.MAP_SIZE_SOURCE):
            raise _invalid(f"{field}.size", f"must be source or unset for an overlay, is {size}")
        size = jobs.MapSize.SOURCE
    return jobs.Spec(
        index=index,
        method=words.word(words.METHODS, spec.method, f"{field}.method"),
        layers=tuple(spec.layers) or (card.default_layer,),
        target=_target(spec.target, card, f"{field}.target"),
        profile=words.word(words.PROFILES, spec.profile, f"{field}.profile"),
        fusion=words.word(words.FUSIONS, spec.fusion, f"{field}.fusion"),
        rectify=spec.rectify if spec.HasField("rectify") else None,
        normalisation=words.word(words.NORMALISATIONS, spec.normalisation, f"{field}.normalisation"),
        size=size,
        encoding=encoding,
        overlay_opacity=opacity,
    )


def _target(target: spec_pb2.Target, card: ModelCard, field: str) -> jobs.Target:
    score = words.word(words.SCORES, target.score, f"{field}.score")
    match target.WhichOneof("kind"):
        case None | "predicted":
            return jobs.Target(score=score)
        case "class_index":
            return jobs.Target(kind=jobs.TargetKind.CLASS_INDEX, value=target.class_index, score=score)
        case "class_label":
            index = _label_index(target.class_label, card, f"{field}.class_label")
            return jobs.Target(kind=jobs.TargetKind.CLASS_INDEX, value=index, score=score)
        case "kth":
            return jobs.Target(kind=jobs.TargetKind.KTH, value=target.kth.k, score=score)
        case "top":
            return jobs.Target(kind=jobs.TargetKind.TOP_K, value=target.top.k, score=score)
        case other:
            raise AssertionError(f"This is a bug: target {other} passed refuse_unbuilt")


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


def _invalid(field: str, said: str) -> InvalidRequest:
    return InvalidRequest(Reason.FIELD_INVALID, f"{field} {said}", field=field)

"""A peer to talk to: a real gRPC server on port 0 that answers as the contract says and fails when it is told to."""

from __future__ import annotations

import collections
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from camserve.client import AsyncClient, Client
from camserve.v1 import (
    explanation_service_pb2,
    explanation_service_pb2_grpc,
    heatmap_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    spec_pb2,
)

Answer = Callable[
    [explanation_service_pb2.ExplainRequest, grpc.ServicerContext], Iterator[explanation_service_pb2.ExplainResponse]
]

VALUES = np.array([[0.0, 1.0], [2.0, 4.0]], np.float32)


class _RichStatus(grpc.Status):  # type: ignore[misc]  # Untyped upstream.
    """The form in which grpc takes a status with trailing metadata."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, bytes], ...]) -> None:
        self.code, self.details, self.trailing_metadata = code, details, trailing_metadata


def when_left(context: grpc.ServicerContext, event: threading.Event) -> None:
    """Sets an event when the caller is gone, also where it was gone before the handler began."""
    if not context.add_callback(event.set):
        event.set()


class Peer(explanation_service_pb2_grpc.ExplanationServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    """Answers with a 2 x 2 map for each spec.

    Attributes:
        target: its address.
        requests: the explanation requests that arrived, in order.
        failures: statuses to refuse with, one call each, before it answers.
        answer: makes the responses; tests put their own here.
        cancelled: set when a caller left before the answer was complete.
        most_at_once: the largest number of explanations that were under way together.
    """

    def __init__(self) -> None:
        self.requests: list[explanation_service_pb2.ExplainRequest] = []
        self.failures: collections.deque[status_pb2.Status] = collections.deque()
        self.answer: Answer = self.full_answer
        self.cancelled = threading.Event()
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(16))
        explanation_service_pb2_grpc.add_ExplanationServiceServicer_to_server(self, self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        self.target = f"localhost:{self._server.add_insecure_port('localhost:0')}"
        self._server.start()

    def stop(self) -> None:
        """Ends the server and waits until it is gone."""
        self._server.stop(None).wait()

    def Explain(  # noqa: N802  # gRPC's name.
        self, request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        """Refuses as told, or answers."""
        with self._lock:
            self.requests.append(request)
            self._refuse_if_told(context)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            yield from self.answer(request, context)
        finally:
            with self._lock:
                self._under_way -= 1

    def ListModels(  # noqa: N802  # gRPC's name.
        self, request: model_service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.ListModelsResponse:
        """Lists one ready model and one that failed."""
        self._refuse_if_told(context)
        return model_service_pb2.ListModelsResponse(
            models=[
                model_service_pb2.ModelStatus(
                    name="broken", version="1", state="MODEL_STATE_FAILED", error="no such file"
                ),
                model_service_pb2.ModelStatus(
                    name="surface", version="2", state="MODEL_STATE_READY", class_count=2, default_layer="layer2"
                ),
            ]
        )

    def GetModel(  # noqa: N802  # gRPC's name.
        self, request: model_service_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.GetModelResponse:
        """Returns the card of "surface"."""
        self._refuse_if_told(context)
        if request.model != "surface":
            abort(context, status("NOT_FOUND", "MODEL_NOT_FOUND", f"no model '{request.model}'; there are surface"))
        card = model_service_pb2.ModelCard(
            name="surface",
            version="2",
            labels=["good", "scratch"],
            class_count=2,
            kind="PROGRAM_KIND_TORCHSCRIPT",
            device="cpu",
            dtype="float32",
            default_layer="layer2",
            max_batch_rows=16,
            rows_independent=True,
            model_sha256="ab" * 32,
            notes=["made for tests"],
            output_kind="OUTPUT_KIND_CLASSIFICATION",
            stages=["layer1", "layer2"],
            phrases=["a scratch"],
        )
        card.extra_inputs.add(name="mask", shape=[1, 4], dtype="float32")
        card.plan.form, card.plan.speedup, card.plan.deviation = "folded, channels last", 1.5, 2e-6
        card.plan.threads, card.plan.chunk_rows = 2, 4
        card.input.shape.extend([3, 32, 32])
        card.layers.add(name="layer2", shape=[8, 2, 2], layout="LAYER_LAYOUT_CHANNELS_FIRST", map_shape=[2, 2])
        card.layers.add(name="flat", shape=[8], refusal="no spatial extent")
        card.methods.add(method="METHOD_GRAD_CAM", works=True)
        card.methods.add(method="METHOD_CAM", works=False, note="two linear layers follow")
        card.warm_up.FromMilliseconds(1500)
        return model_service_pb2.GetModelResponse(card=card)

    def full_answer(
        self, request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        """Yields a prediction, a map for each class of each spec, a summary; specs without layers named "flat" only."""
        if request.HasField("image") and not _is_image(request.image.data):
            abort(context, status("INVALID_ARGUMENT", "IMAGE_UNDECODABLE", "the bytes are no image"))
        yield prediction()
        for index, spec in enumerate(request.specs):
            if "flat" in spec.layers:
                yield spec_error(index, status("FAILED_PRECONDITION", "LAYER_UNUSABLE", "layer 'flat' gives no map"))
                continue
            count = spec.target.top.k or 1
            for rank in range(count):
                yield heatmap(
                    spec_index=index,
                    target_index=rank,
                    target_count=count,
                    method=spec.method,
                    layers=spec.layers or ["layer2"],
                    source=_size(request),
                )
        yield summary(request)

    def _refuse_if_told(self, context: grpc.ServicerContext) -> None:
        if self.failures:
            abort(context, self.failures.popleft())


def status(
    code: str, reason: str, message: str, *, retry_after: float | None = None, field: str = "", **metadata: str
) -> status_pb2.Status:
    """Returns a status as camserve makes it."""
    made = status_pb2.Status(code=getattr(grpc.StatusCode, code).value[0], message=message)
    made.details.append(_packed(error_details_pb2.ErrorInfo(reason=reason, domain="camserve", metadata=metadata)))
    if retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after * 1e9))
        made.details.append(_packed(retry))
    if field:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=field, description="is wrong")
        made.details.append(_packed(bad))
    return made


def abort(context: grpc.ServicerContext, refusal: status_pb2.Status) -> None:
    """Ends a call with a status and its details; a status without details is sent as plain gRPC would."""
    code = next(code for code in grpc.StatusCode if code.value[0] == refusal.code)
    trailers = (("grpc-status-details-bin", refusal.SerializeToString()),) if refusal.details else ()
    context.abort_with_status(_RichStatus(code, refusal.message, trailers))


def prediction() -> explanation_service_pb2.ExplainResponse:
    """Says "scratch", 75 %."""
    return explanation_service_pb2.ExplainResponse(
        prediction=heatmap_pb2.Prediction(
            classes=[
                heatmap_pb2.ClassScore(class_index=1, label="scratch", logit=1.5, probability=0.75),
                heatmap_pb2.ClassScore(class_index=0, label="good", logit=0.5, probability=0.25),
            ],
            model="surface",
            version="2",
        )
    )


def heatmap(
    values: npt.NDArray[np.float32] = VALUES, source: tuple[int, int] | None = (4, 4), **fields: Any
) -> explanation_service_pb2.ExplainResponse:
    """Returns a float32 map that covers a source of (width, height) pixels."""
    payload = values.astype("<f4").tobytes()
    message = heatmap_pb2.Heatmap(
        target=heatmap_pb2.ResolvedTarget(class_index=1, label="scratch", score="SCORE_LOGIT", value=1.5),
        profile="PROFILE_PAPER",
        shape=values.shape,
        axes=["h", "w"],
        encoding="ENCODING_FLOAT32",
        payload=payload,
        value_min=values.min(),
        value_max=values.max(),
        raw_min=values.min(),
        raw_max=values.max(),
        payload_sha256=hashlib.sha256(payload).digest(),
        raw_sha256=hashlib.sha256(payload).digest(),
        completed=1,
    )
    # Merging appends to what is repeated.
    for name in fields.keys() & {"axes", "layers"}:
        message.ClearField(name)
    message.MergeFrom(heatmap_pb2.Heatmap(**{"method": spec_pb2.METHOD_GRAD_CAM, "target_count": 1, **fields}))
    if source is not None:
        for axis, pixels, cells in (("x", source[0], values.shape[1]), ("y", source[1], values.shape[0])):
            setattr(message.geometry, f"scale_{axis}", pixels / cells)
            setattr(message.geometry, f"offset_{axis}", pixels / cells / 2 - 0.5)
        message.geometry.source_width_pixels, message.geometry.source_height_pixels = source
    return explanation_service_pb2.ExplainResponse(heatmap=message)


def spec_error(index: int, why: status_pb2.Status) -> explanation_service_pb2.ExplainResponse:
    """Returns the failure of one spec."""
    return explanation_service_pb2.ExplainResponse(
        spec_error=explanation_service_pb2.SpecError(spec_index=index, status=why)
    )


def summary(request: explanation_service_pb2.ExplainRequest) -> explanation_service_pb2.ExplainResponse:
    """Returns the last message."""
    message = heatmap_pb2.Summary(
        request_id=request.request_id or "made-up",
        model="surface",
        version="2",
        batch_rows=3,
        plan="tapped",
        device="cpu",
    )
    message.timings.forward.FromMilliseconds(12)
    message.timings.total.FromMilliseconds(20)
    return explanation_service_pb2.ExplainResponse(summary=message)


def _packed(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _is_image(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).close()
    except OSError:
        return False
    return True


def _size(request: explanation_service_pb2.ExplainRequest) -> tuple[int, int] | None:
    if request.HasField("image"):
        with Image.open(io.BytesIO(request.image.data)) as image:
            return image.size
    if request.HasField("frame"):
        return request.frame.width_pixels, request.frame.height_pixels
    return None


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A server under the test's control."""
    server = Peer()
    yield server
    server.stop()


@pytest.fixture
def client(peer: Peer) -> Iterator[Client]:
    """A client of that server."""
    with Client(peer.target, timeout=120) as connected:
        yield connected


@pytest.fixture
async def async_client(peer: Peer) -> AsyncClient:
    """An asyncio client of that server; the test closes it."""
    return AsyncClient(peer.target, timeout=120)


@pytest.fixture
def png() -> bytes:
    """A gray PNG file, 6 wide and 4 high."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (100, 100, 100)).save(file, "PNG")
    return file.getvalue()

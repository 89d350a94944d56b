"""The interceptor around handlers of its own on a real grpc.aio server: what a caller sees of each way to end."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2
from support.cards import card

from camserve.server.access import current_record
from camserve.server.callers import CallerLimits, Guard, current_caller
from camserve.server.callers.caller_file import KeyEntry
from camserve.server.callers.turnstile import Turnstile
from camserve.server.errors import (
    CamserveError,
    ExecutionFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    Reason,
    Unsupported,
)
from camserve.server.interceptors import CallInterceptor
from camserve.server.logs import configure_logs
from camserve.server.metrics import Metrics
from camserve.server.reception import Reception
from camserve.server.validate import RequestLimits, check_job
from camserve.server.wire.requests import job_from_request
from camserve.v1 import explanation_service_pb2, spec_pb2

Handler = Callable[[bytes, Any], Any]
DETAILS = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
        error_details_pb2.ResourceInfo,
    )
}

# The methods below are none of ours; anybody may call them.
GUARD = Guard(role_of={f"/camserve.v1.Test/{method}": None for method in ("Unary", "Explain", "Chat")})


class Service:
    """A server with one unary and one streaming method, both doing what the test says, and those that take streams."""

    def __init__(self, guard: Guard = GUARD) -> None:
        self.metrics = Metrics()
        turnstile = Turnstile(lambda _: CallerLimits(), self.metrics)
        self._server = grpc.aio.server(
            interceptors=[
                CallInterceptor(self.metrics, turnstile, Reception(8, 60, self.metrics), guard=guard, write_seconds=60)
            ]
        )

    async def start(self, unary: Handler, stream: Handler, chat: Handler | None = None) -> grpc.aio.Channel:
        """Serves and connects. Logs as JSON; configured here because pytest captures a test apart from its fixtures."""
        configure_logs("json", "info")
        handlers = {
            "Unary": grpc.unary_unary_rpc_method_handler(unary),
            "Explain": grpc.unary_stream_rpc_method_handler(stream),
        }
        if chat is not None:
            read = explanation_service_pb2.ExplainRequest.FromString
            is_generator = inspect.isasyncgenfunction(chat)
            kind = grpc.stream_stream_rpc_method_handler if is_generator else grpc.stream_unary_rpc_method_handler
            handlers["Chat"] = kind(chat, request_deserializer=read)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("camserve.v1.Test", handlers),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        return self.channel

    async def stop(self) -> None:
        """Ends it."""
        await self.channel.close()
        await self._server.stop(grace=None)


@pytest.fixture
async def service(capsys) -> AsyncIterator[Service]:
    """Stopped at the end, and logging left as it was."""
    before = structlog.get_config()
    service = Service()
    yield service
    await service.stop()
    structlog.configure(**before)


async def end_of(service: Service, error: Exception, *, streaming: bool) -> grpc.aio.AioRpcError:
    """Raises the error in a handler and returns what the caller catches."""

    async def unary(_request: bytes, _context: Any) -> bytes:
        current_record().request_id = "r-1"
        raise error

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        current_record().request_id = "r-1"
        yield b"first"
        raise error

    channel = await service.start(unary, stream)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answers(channel, streaming=streaming)
    return caught.value


async def answers(channel: grpc.aio.Channel, *, streaming: bool) -> list[bytes]:
    """Every answer of one of the two methods."""
    if streaming:
        return [message async for message in channel.unary_stream("/camserve.v1.Test/Explain")(b"")]
    return [await channel.unary_unary("/camserve.v1.Test/Unary")(b"")]


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The status in the trailers; it says the same as gRPC's own fields."""
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert error.code().value[0] == status.code
    assert error.details() == status.message
    return status


def details_of(status: status_pb2.Status) -> dict[str, Any]:
    """Details by kind; one of each at most."""
    found: dict[str, Any] = {}
    for packed in status.details:
        name = packed.TypeName()
        assert name not in found
        found[name] = DETAILS[name].FromString(packed.value)
    return {name.removeprefix("google.rpc."): detail for name, detail in found.items()}


def trailer_bytes(error: grpc.aio.AioRpcError) -> int:
    """What the trailers take as HTTP/2 counts them: names, values and 32 bytes for each; binary ones as base64."""
    total = 0
    for key, value in error.trailing_metadata():
        total += len(key) + 32 + (len(base64.b64encode(value)) if isinstance(value, bytes) else len(value))
    message = "".join(chr(byte) if 32 <= byte < 127 else "%00" for byte in error.details().encode())
    return total + len("grpc-status0grpc-message") + 64 + len(message)


def log_lines(text: str) -> list[dict[str, Any]]:
    """What was logged."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "streaming"])
async def test_a_wrong_field_is_named(service, streaming):
    """INVALID_ARGUMENT with exactly ErrorInfo and BadRequest."""
    raised = InvalidRequest(Reason.FIELD_INVALID, "top_k is 0", field="top_k", metadata={"value": 0})

    status = status_of(await end_of(service, raised, streaming=streaming))

    details = details_of(status)
    assert grpc.StatusCode.INVALID_ARGUMENT.value[0] == status.code
    assert ["ErrorInfo", "BadRequest"] == list(details)
    info = details["ErrorInfo"]
    assert ("FIELD_INVALID", "camserve", {"value": "0"}) == (info.reason, info.domain, dict(info.metadata))
    violations = details["BadRequest"].field_violations
    assert [("top_k", "top_k is 0")] == [(violation.field, violation.description) for violation in violations]


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "streaming"])
async def test_a_full_server_tells_when_to_come_back(service, streaming):
    """RESOURCE_EXHAUSTED with exactly ErrorInfo and RetryInfo."""
    status = status_of(
        await end_of(service, Overloaded(Reason.QUEUE_FULL, "full", retry_after_seconds=1.25), streaming=streaming)
    )

    details = details_of(status)
    assert grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] == status.code
    assert ["ErrorInfo", "RetryInfo"] == list(details)
    assert 1.25 == details["RetryInfo"].retry_delay.ToTimedelta().total_seconds()


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "streaming"])
async def test_a_missing_thing_is_named(service, streaming):
    """NOT_FOUND with exactly ErrorInfo, which holds the path, and ResourceInfo."""
    raised = NotFound(Reason.MODEL_NOT_FOUND, "no such model", field="model", metadata={"model": "part"})

    status = status_of(await end_of(service, raised, streaming=streaming))

    details = details_of(status)
    assert grpc.StatusCode.NOT_FOUND.value[0] == status.code
    assert ["ErrorInfo", "ResourceInfo"] == list(details)
    assert {"model": "part", "field": "model"} == dict(details["ErrorInfo"].metadata)
    resource = details["ResourceInfo"]
    assert ("camserve.v1.model", "part") == (resource.resource_type, resource.resource_name)


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "streaming"])
async def test_a_surprise_is_internal_and_tells_nothing_of_the_inside(service, streaming, capsys):
    """The caller gets the request id; text and traceback of the exception stay in the log."""
    error = await end_of(service, KeyError("password 1234 at /srv/secret"), streaming=streaming)

    status = status_of(error)
    assert grpc.StatusCode.INTERNAL is error.code()
    assert "INTERNAL" == details_of(status)["ErrorInfo"].reason
    assert "r-1" in status.message
    assert b"1234" not in status.SerializeToString()
    assert b"Traceback" not in status.SerializeToString()
    # The record closes just after the status has left.
    await service.stop()
    unexpected, call = log_lines(capsys.readouterr().err)
    assert ("unexpected error", "r-1") == (unexpected["event"], unexpected["request_id"])
    assert "password 1234" in unexpected["exception"]
    assert ("call", "INTERNAL", "INTERNAL") == (call["event"], call["code"], call["reason"])


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "streaming"])
async def test_an_abort_passes_through_with_its_code(service, streaming, capsys):
    """The health service ends calls by itself; the record tells how."""

    async def unary(_request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        raise AssertionError

    async def stream(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        yield b""

    channel = await service.start(unary, stream)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answers(channel, streaming=streaming)

    # The record closes just after the status has left.
    await service.stop()
    assert (grpc.StatusCode.NOT_FOUND, "unknown service") == (caught.value.code(), caught.value.details())
    assert ["NOT_FOUND"] == [line["code"] for line in log_lines(capsys.readouterr().err)]


async def test_a_caller_who_leaves_gives_the_place_back_at_once(service, capsys):
    """Leaving a stream closes the handler's generator; the record says CANCELLED."""
    left = asyncio.Event()

    async def unary(_request: bytes, _context: Any) -> bytes:
        return b""

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            left.set()

    channel = await service.start(unary, stream)
    call = channel.unary_stream("/camserve.v1.Test/Explain")(b"")
    assert b"first" == await call.read()
    call.cancel()

    await asyncio.wait_for(left.wait(), 10)
    await service.stop()
    assert ["CANCELLED"] == [line["code"] for line in log_lines(capsys.readouterr().err)]


async def test_a_handler_that_writes_by_itself_is_served(service):
    """The health service's Watch is no generator: it writes to the context."""

    async def unary(_request: bytes, _context: Any) -> bytes:
        return b""

    async def stream(_request: bytes, context: Any) -> None:
        await context.write(b"one")
        await context.write(b"two")

    channel = await service.start(unary, stream)

    assert [b"one", b"two"] == await answers(channel, streaming=True)


async def test_answers_pass_through_and_are_counted(service):
    """Only Explain calls are counted as requests, by status."""

    async def unary(request: bytes, _context: Any) -> bytes:
        return request[::-1]

    async def stream(request: bytes, _context: Any) -> AsyncIterator[bytes]:
        current_record().model, current_record().version = "part", "1"
        yield request

    channel = await service.start(unary, stream)
    assert b"cba" == await channel.unary_unary("/camserve.v1.Test/Unary")(b"abc")
    assert [b"abc"] == [message async for message in channel.unary_stream("/camserve.v1.Test/Explain")(b"abc")]
    # The handler's record closes just after its last message has left.
    await service.stop()

    labels = {"model": "part", "version": "1", "code": "OK"}
    assert 1 == service.metrics.registry.get_sample_value("camserve_requests_total", labels)


def refusal(act: Callable[[], Any]) -> CamserveError:
    """What real code refuses with."""
    with pytest.raises(CamserveError) as caught:
        act()
    return caught.value


def unknown_label(label: str, labels: tuple[str, ...]) -> CamserveError:
    """A label that a model does not have."""
    request = explanation_service_pb2.ExplainRequest(
        image={"data": b"-"},
        specs=[spec_pb2.Spec(method=spec_pb2.METHOD_GRAD_CAM, target={"class_label": label})],
    )
    model = card(labels=labels, class_count=len(labels))
    return refusal(
        lambda: job_from_request(request, model, request_id="r", received_at=0.0, deadline=None, caller="test")
    )


def unknown_layer(name: str) -> CamserveError:
    """A layer that a model does not have."""
    request = explanation_service_pb2.ExplainRequest(
        image={"data": b"-"}, specs=[spec_pb2.Spec(method=spec_pb2.METHOD_GRAD_CAM, layers=[name])]
    )
    job = job_from_request(request, card(), request_id="r", received_at=0.0, deadline=None, caller="test")
    return refusal(lambda: check_job(job, card(), RequestLimits(max_specs=1, max_maps=1)))


LONG_ERRORS: dict[str, Callable[[], CamserveError]] = {
    "1000 long labels": lambda: unknown_label("x", tuple(f"{index} {'long label ' * 40}" for index in range(1000))),
    "1000 long labels in another script": lambda: unknown_label("x", tuple(f"{n} {'標籤' * 200}" for n in range(1000))),
    "a label of a megabyte": lambda: unknown_label("標" * 300_000, ("a", "b")),
    "a layer of a megabyte": lambda: unknown_layer("layer" * 200_000),
    "a layer of control characters": lambda: unknown_layer("\x00\n" * 3000),
    "everything at once": lambda: Unsupported(
        Reason.LAYER_UNUSABLE,
        "é" * 5000,
        field="specs[0].layers[0]" * 100,
        metadata={f"key{index}": "é" * 3000 for index in range(8)},
    ),
    "a model's own complaint": lambda: ExecutionFailed(Reason.MODEL_FAILED, "\n".join(map(str, range(5000)))),
}


@pytest.mark.parametrize("name", LONG_ERRORS)
async def test_no_refusal_is_too_long_for_the_trailers(service, name):
    """Whatever names and lists a text holds, status, reason and details arrive, within gRPC's 8 KiB."""
    raised = LONG_ERRORS[name]()

    error = await end_of(service, raised, streaming=True)

    details = details_of(status_of(error))
    assert raised.reason == details["ErrorInfo"].reason
    assert raised.metadata.keys() <= details["ErrorInfo"].metadata.keys()
    assert 8192 > trailer_bytes(error)
    assert error.details()[:20] == raised.message[:20]


async def test_a_text_that_utf8_cannot_hold_is_told_all_the_same(service):
    """Half a surrogate pair comes from names of files and from JSON; the refusal that names it arrives, escaped."""
    raised = InvalidRequest(Reason.FIELD_INVALID, "'\ud800' is no name", field="\ud800", metadata={"name": "\ud800"})

    error = await end_of(service, raised, streaming=True)

    assert (grpc.StatusCode.INVALID_ARGUMENT, r"'\ud800' is no name") == (error.code(), error.details())
    assert r"\ud800" == details_of(status_of(error))["ErrorInfo"].metadata["name"]


async def test_concurrent_calls_have_records_of_their_own(service, capsys):
    """What one call notes is not written under another."""
    both = asyncio.Barrier(2)

    async def unary(request: bytes, _context: Any) -> bytes:
        current_record().request_id = request.decode()
        await both.wait()
        return current_record().request_id.encode()

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b""

    channel = await service.start(unary, stream)
    call: Callable[[bytes], Awaitable[bytes]] = channel.unary_unary("/camserve.v1.Test/Unary")

    assert [b"one", b"two"] == list(await asyncio.gather(call(b"one"), call(b"two")))
    await service.stop()
    assert {"one", "two"} == {line["request_id"] for line in log_lines(capsys.readouterr().err)}


async def nothing(_request: bytes, _context: Any) -> bytes:
    """A method that a test does not ask."""
    return b""


def named(*models: str) -> list[bytes]:
    """Messages of a stream."""
    return [explanation_service_pb2.ExplainRequest(model=model).SerializeToString() for model in models]


async def chatted(channel: grpc.aio.Channel, messages: list[bytes], got: list[bytes], *, streaming: bool) -> None:
    """Sends all messages, and collects the answers that come."""
    if streaming:
        async for answer in channel.stream_stream("/camserve.v1.Test/Chat")(iter(messages)):
            got.append(answer)  # noqa: PERF401 - those before an error count
    else:
        got.append(await channel.stream_unary("/camserve.v1.Test/Chat")(iter(messages)))


async def test_a_stream_of_requests_is_read_answered_and_recorded(service, capsys):
    """Each message is read as it comes and answered on the same stream; one record tells how the call ended."""

    async def chat(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[bytes]:
        current_record().request_id = f"r-{current_caller().name}"
        async for request in requests:
            yield request.model.encode()
            if request.model == "last":
                return

    channel = await service.start(nothing, nothing, chat)
    call = channel.stream_stream("/camserve.v1.Test/Chat")()
    for model, message in zip(("one", "two", "last"), named("one", "two", "last"), strict=True):
        await call.write(message)
        assert model.encode() == await call.read()
    assert grpc.aio.EOF is await call.read()

    await service.stop()
    (line,) = log_lines(capsys.readouterr().err)
    assert ("/camserve.v1.Test/Chat", "OK", "r-ipv4:127.0.0.1") == (line["rpc"], line["code"], line["request_id"])


async def test_a_stream_of_requests_may_have_one_answer(service):
    """Calls that stream in one direction only are covered as well."""

    async def chat(requests: AsyncIterator[Any], _context: Any) -> bytes:
        return b" ".join([request.model.encode() async for request in requests])

    channel = await service.start(nothing, nothing, chat)

    assert b"one two" == await channel.stream_unary("/camserve.v1.Test/Chat")(iter(named("one", "two")))


@pytest.mark.parametrize("streaming", [False, True], ids=["one answer", "streaming"])
async def test_a_message_within_a_stream_that_cannot_be_read_is_refused(service, capsys, streaming):
    """INVALID_ARGUMENT with a reason, after what the messages before it were answered; gRPC itself says UNKNOWN."""

    async def stream(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.model.encode()

    async def single(requests: AsyncIterator[Any], _context: Any) -> bytes:
        return b" ".join([request.model.encode() async for request in requests])

    channel = await service.start(nothing, nothing, stream if streaming else single)
    messages = [*named("one"), b"\xff\xff"]
    got: list[bytes] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chatted(channel, messages, got, streaming=streaming)

    status = status_of(caught.value)
    assert grpc.StatusCode.INVALID_ARGUMENT.value[0] == status.code
    assert "FIELD_INVALID" == details_of(status)["ErrorInfo"].reason
    assert "/camserve.v1.Test/Chat" in status.message
    assert ([b"one"] if streaming else []) == got
    await service.stop()
    assert ["INVALID_ARGUMENT"] == [line["code"] for line in log_lines(capsys.readouterr().err)]


async def test_a_surprise_within_a_stream_is_internal(service, capsys):
    """Its text stays in the log."""

    async def chat(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield b"first"
            raise KeyError("password 1234")

    channel = await service.start(nothing, nothing, chat)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chatted(channel, named("one"), [], streaming=True)

    assert grpc.StatusCode.INTERNAL is caught.value.code()
    assert b"1234" not in status_of(caught.value).SerializeToString()
    await service.stop()
    assert ["unexpected error", "call"] == [line["event"] for line in log_lines(capsys.readouterr().err)]


@pytest.mark.parametrize("waits_in", ["the next message", "its own work", "a task that reads"])
async def test_who_leaves_a_stream_of_requests_ends_its_handler(service, capsys, waits_in):
    """Wherever the handler is: its generator is closed at once, and the record says CANCELLED."""
    left = asyncio.Event()

    async def chat(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            if waits_in == "the next message":
                async for _ in requests:
                    pass
            elif waits_in == "a task that reads":
                # For gRPC the caller's messages end before its call is cancelled.
                await asyncio.wait({asyncio.ensure_future(anext(requests, None))})
            await asyncio.Event().wait()
        finally:
            left.set()

    channel = await service.start(nothing, nothing, chat)
    call = channel.stream_stream("/camserve.v1.Test/Chat")()
    assert b"first" == await call.read()
    call.cancel()

    await asyncio.wait_for(left.wait(), 10)
    await service.stop()
    assert ["CANCELLED"] == [line["code"] for line in log_lines(capsys.readouterr().err)]


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "streaming"])
async def test_who_cannot_be_told_is_refused(capsys, streaming):
    """A guard that fails lets nobody in: INTERNAL, one log line of the call, and its text stays in the log."""

    def fails() -> tuple[KeyEntry, ...]:
        raise KeyError("password 1234")

    asked = []

    async def unary(_request: bytes, _context: Any) -> bytes:
        asked.append("unary")
        return b""

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        asked.append("stream")
        yield b""

    async def call(channel: grpc.aio.Channel) -> None:
        metadata = (("x-api-key", "any"),)
        if streaming:
            await channel.unary_stream("/camserve.v1.Test/Explain")(b"", metadata=metadata).read()
        else:
            await channel.unary_unary("/camserve.v1.Test/Unary")(b"", metadata=metadata)

    before = structlog.get_config()
    service = Service(Guard(keys=fails, role_of=GUARD.role_of))
    channel = await service.start(unary, stream)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel)
    await service.stop()
    structlog.configure(**before)

    assert ([], grpc.StatusCode.INTERNAL) == (asked, caught.value.code())
    assert b"1234" not in status_of(caught.value).SerializeToString()
    unexpected, line = log_lines(capsys.readouterr().err)
    assert ("unexpected error", "INTERNAL") == (unexpected["event"], line["code"])


@pytest.mark.parametrize("rpc", ["Unary", "Explain"])
async def test_a_call_that_ends_before_its_message_is_told_so(service, rpc):
    """What a client of one message never does, and what others may."""

    async def unary(_request: bytes, _context: Any) -> bytes:
        raise AssertionError("there is nothing to answer")

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield await unary(_request, _context)

    async def nothing() -> AsyncIterator[bytes]:
        for message in ():
            yield message

    channel = await service.start(unary, stream)
    with pytest.raises(grpc.aio.AioRpcError, match="ended before a request arrived") as caught:
        await channel.stream_unary(f"/camserve.v1.Test/{rpc}")(nothing())

    assert grpc.StatusCode.INVALID_ARGUMENT is caught.value.code()
    assert "FIELD_INVALID" == details_of(status_of(caught.value))["ErrorInfo"].reason

"""What a collector is sent: a real OTLP receiver, real servers, and the traces of requests that share passes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from io import BytesIO

import grpc
import numpy as np
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from support import oip
from support.fragile import SLOW, fragile_source, slow
from support.nets import TinyNet
from support.otlp import Collector, Span, collecting
from support.patience import DEADLINES
from support.processes import camserve_process
from support.servers import Metrics, script_source, settings, until

from camserve.server import spans
from camserve.server.background import BackgroundServer
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import explanation_service_pb2_grpc, input_pb2, model_service_pb2, model_service_pb2_grpc, spec_pb2

EXPLAIN = "camserve.v1.ExplanationService/Explain"
ROW = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Logging is configured once for a process; other tests start from where they were."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that nobody sends to yet."""
    with collecting() as collector:
        yield collector


@pytest.fixture
def traced(collector, monkeypatch) -> Collector:
    """The collector that servers of this test send to."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    return collector


@contextlib.asynccontextmanager
async def serving(**changes: object) -> AsyncIterator[BackgroundServer]:
    """A server of the slow model; behind the block it has ended, and sent what it had to send."""
    server = BackgroundServer(settings(**changes), [fragile_source(slow)])
    await asyncio.to_thread(server.__enter__)
    yield server
    await asyncio.to_thread(server.__exit__, None, None, None)


def request(
    model: str, methods: Sequence[int] = (spec_pb2.METHOD_GRAD_CAM,), request_id: str = "", **fields: object
) -> service_pb2.ExplainRequest:
    """A request for one row."""
    tensor = input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=ROW.shape, data=ROW.tobytes())
    fields.setdefault("tensor", None if "image" in fields else tensor)
    return service_pb2.ExplainRequest(
        model=model, specs=[spec_pb2.Spec(method=method) for method in methods], request_id=request_id, **fields
    )


def parent(number: int, *, is_sampled: bool = True) -> tuple[str, str, list[tuple[str, str]]]:
    """A caller's trace id and span id, and the metadata that tells them."""
    trace_id, span_id = f"{number + 1:032x}", f"{number + 0xA0:016x}"
    return trace_id, span_id, [("traceparent", f"00-{trace_id}-{span_id}-{'01' if is_sampled else '00'}")]


def half_a_picture() -> bytes:
    """Its header is as it should be."""
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]


async def explain(
    channel: grpc.aio.Channel, asked: service_pb2.ExplainRequest, number: int, **options: object
) -> list[service_pb2.ExplainResponse]:
    """Asks as part of the trace with that number."""
    call = explanation_service_pb2_grpc.ExplanationServiceStub(channel).Explain
    return [message async for message in call(asked, metadata=parent(number)[2], **options)]


def ended(collected: list[Span], count: int) -> bool:
    """Whether so many calls are over, with all that was told of them before."""
    return count <= sum(span.name == EXPLAIN for span in collected)


def children(collected: Sequence[Span], of: Span) -> list[Span]:
    """In order of their beginning."""
    found = [span for span in collected if (span.trace_id, span.parent_id) == of.place]
    return sorted(found, key=lambda span: span.began)


def check_request(collected: Sequence[Span], server: Span, shared: Span, number: int) -> None:
    """The span of a call in its caller's trace, its stages in order, and the way to its pass and back."""
    trace_id, span_id, _ = parent(number)
    assert ("SERVER", trace_id, span_id) == (server.kind, server.trace_id, server.parent_id)
    assert {
        "rpc.system": "grpc",
        "rpc.service": "camserve.v1.ExplanationService",
        "rpc.method": "Explain",
        "rpc.grpc.status_code": 0,
        "camserve.request_id": f"r-{number}",
        "camserve.version": "1",
        "camserve.lane": "standard",
        "camserve.specs": 1,
        "camserve.batch_rows": shared.attributes["camserve.rows"],
    } == {key: value for key, value in server.attributes.items() if key != "camserve.model"}
    decode, queue, device, encode = children(collected, server)
    assert ["decode", "queue", "device", "encode"] == [span.name for span in (decode, queue, device, encode)]
    assert (shared.place,) == device.links
    assert server.place in shared.links
    assert server.began <= decode.began <= decode.ended <= queue.ended <= device.ended
    assert {"camserve.spec": 0} == encode.attributes


async def test_a_process_sends_the_traces_of_requests_that_share_a_pass(collector, tmp_path):
    """`camserve serve` with the standard variables: each request in its caller's trace, the shared pass linked to all of them."""
    archive = script_source("tiny", TinyNet(), tmp_path).path
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    count = 0
    with camserve_process(archive, 32, tmp_path / "log", environment) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            while not (shared := [span for span in collector.spans() if span.name == "pass" and len(span.links) > 1]):
                asked = range(count, count + 16)
                await asyncio.gather(*(explain(channel, request("tiny", request_id=f"r-{n}"), n) for n in asked))
                count += 16
                await asyncio.to_thread(collector.wait_for, lambda collected: ended(collected, count))  # noqa: B023
    # What was left was sent when the process ended.
    collected = collector.spans()

    assert {("camserve", "service.name")} == {(span.resource["service.name"], "service.name") for span in collected}
    one = shared[0]
    assert "" == one.parent_id
    assert {
        "camserve.model": "tiny",
        "camserve.version": "1",
        "camserve.rows": len(one.links),
    }.items() <= one.attributes.items()
    assert {"camserve.explanations": len(one.links), "camserve.plan": "tapped"}.items() <= one.attributes.items()
    assert {"camserve.depth", "camserve.forward_seconds", "camserve.backward_seconds"} <= one.attributes.keys()
    methods = children(collected, one)
    assert len(one.links) == len(methods)
    assert {"method"} == {span.name for span in methods}
    assert {"grad-cam"} == {span.attributes["camserve.method"] for span in methods}
    by_place = {span.place: span for span in collected}
    members = [by_place[link] for link in one.links]
    assert {span.attributes["camserve.request_id"] for span in members} == {
        span.attributes["camserve.request_id"] for span in methods
    }
    for member in members:
        check_request(collected, member, one, int(member.attributes["camserve.request_id"][2:]))
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    calls = {line["request_id"]: line["trace_id"] for line in lines if line["event"] == "call"}
    assert {f"r-{number}": parent(number)[0] for number in range(count)} == calls


async def test_only_sampled_requests_are_sent(traced):
    """A pass of three, of which one caller did not sample: two are sent and linked."""
    SLOW.is_held = False
    try:
        async with serving() as server, grpc.aio.insecure_channel(server.target) as channel:
            metrics = Metrics(server)
            SLOW.is_held = True
            call = explanation_service_pb2_grpc.ExplanationServiceStub(channel).Explain

            async def ask(number: int, *, is_sampled: bool) -> None:
                metadata = parent(number, is_sampled=is_sampled)[2]
                asked = request("slow", request_id=f"r-{number}")
                assert 3 == len([message async for message in call(asked, metadata=metadata)])

            asking = [asyncio.create_task(ask(0, is_sampled=False))]
            assert await asyncio.to_thread(SLOW.waiting.acquire, timeout=120)
            # While the first holds the device, three more gather.
            asking += [asyncio.create_task(ask(number, is_sampled=number != 2)) for number in (1, 2, 3)]
            await until(lambda: metrics.value("camserve_queue_depth") == 3)
            SLOW.is_held = False
            SLOW.turns.release()
            await asyncio.gather(*asking)
    finally:
        SLOW.is_held = False

    collected = traced.spans()
    (shared,) = [span for span in collected if span.name == "pass"]
    assert 3 == shared.attributes["camserve.rows"]
    calls = [span for span in collected if span.name == EXPLAIN]
    assert {"r-1", "r-3"} == {span.attributes["camserve.request_id"] for span in calls}
    assert {span.place for span in calls} == set(shared.links)


async def test_amplified_work_is_told_chunk_by_chunk(traced, serve, tmp_path):
    """Chunks belong to one request alone: they are its children, in order, one after another."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), slice_seconds=1e-6)
    async with grpc.aio.insecure_channel(server.target) as channel:
        await explain(channel, request("tiny", [spec_pb2.METHOD_SCORE_CAM], request_id="r-0"), 0)

    collected = await asyncio.to_thread(traced.wait_for, lambda collected: ended(collected, 1))
    (call,) = [span for span in collected if span.name == EXPLAIN]
    chunks = [span for span in children(collected, call) if span.name == "chunk"]
    assert 1 < len(chunks)
    assert [{"camserve.spec": 0, "camserve.method": "score-cam"}] * len(chunks) == [span.attributes for span in chunks]
    assert all(first.ended <= second.began for first, second in itertools.pairwise(chunks))


async def test_a_failure_says_at_which_stage_and_why(traced, serve):
    """A caller's mistake marks its stage, and the call only with the reason; our failure marks the call as well."""
    server = serve(fragile_source(slow))
    async with grpc.aio.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await explain(channel, request("slow", image={"data": half_a_picture()}), 0)
        SLOW.is_held = True
        try:
            holding = asyncio.create_task(explain(channel, request("slow"), 1))
            assert await asyncio.to_thread(SLOW.waiting.acquire, timeout=120)
            # While that one holds the device. Its own deadline, since gRPC's is the caller's to tell.
            for number, seconds in enumerate(DEADLINES, start=2):
                asked = request("slow", deadline={"nanos": int(seconds % 1 * 1e9), "seconds": int(seconds)})
                with pytest.raises(grpc.aio.AioRpcError):
                    await explain(channel, asked, number)
                collected = await asyncio.to_thread(traced.wait_for, lambda spans: ended(spans, number))  # noqa: B023
                if any(span.name == "queue" and span.trace_id == parent(number)[0] for span in collected):
                    break
        finally:
            SLOW.is_held = False
            SLOW.turns.release()
        await holding

    bad, *_, late = sorted((span for span in collected if span.name == EXPLAIN), key=lambda span: span.trace_id)
    assert (3, "IMAGE_UNDECODABLE", "UNSET") == (
        bad.attributes["rpc.grpc.status_code"],
        bad.attributes["error.type"],
        bad.status,
    )
    (decode,) = children(collected, bad)
    assert ("decode", "ERROR", "IMAGE_UNDECODABLE") == (decode.name, decode.status, decode.attributes["error.type"])
    assert (4, "DEADLINE_EXCEEDED", "ERROR") == (
        late.attributes["rpc.grpc.status_code"],
        late.attributes["error.type"],
        late.status,
    )
    assert "deadline passed" in late.message
    _, queue, *_ = children(collected, late)
    assert ("queue", "ERROR", "DEADLINE_EXCEEDED") == (queue.name, queue.status, queue.attributes["error.type"])


async def test_other_calls_are_traced_and_probes_are_not(traced):
    """ListModels is a call like any other, which health checks would bury; a caller's trace that is garbled is none."""
    async with serving() as server, grpc.aio.insecure_channel(server.target) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        await model_service_pb2_grpc.ModelServiceStub(channel).ListModels(
            model_service_pb2.ListModelsRequest(), metadata=[("traceparent", "00-garbled")]
        )

    (span,) = traced.spans()
    assert "camserve.v1.ModelService/ListModels" == span.name
    assert "" == span.parent_id


async def test_the_sampler_of_the_variables_is_honoured(traced, monkeypatch):
    """always_off sends nothing, and the service's name is the operator's."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    async with serving() as server, grpc.aio.insecure_channel(server.target) as channel:
        await explain(channel, request("slow"), 0)

    assert [] == traced.spans()


async def test_the_service_is_named_by_the_variables(traced, monkeypatch):
    """OTEL_SERVICE_NAME goes before our own name."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "press-4")
    async with serving() as server, grpc.aio.insecure_channel(server.target) as channel:
        await explain(channel, request("slow"), 0)

    assert {"press-4"} == {span.resource["service.name"] for span in traced.spans()}


async def test_a_collector_that_is_gone_holds_up_nobody(monkeypatch, capsys):
    """It takes connections and never answers: requests are answered, the drain waits for its bound and says what was lost."""
    monkeypatch.setattr(spans, "_FLUSH_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{gone.getsockname()[1]}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        async with (
            serving(log_level="warning", log_format="json") as server,
            grpc.aio.insecure_channel(server.target) as channel,
        ):
            assert [3] * 20 == [len(await explain(channel, request("slow"), n, timeout=60)) for n in range(20)]
            began = time.monotonic()

    assert 20 > time.monotonic() - began
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert "spans were lost: the collector did not take them in time" in events


async def test_requests_of_the_open_inference_protocol_are_traced_alike(traced, serve, tmp_path):
    """ModelInfer has one span, a stream one and each of its requests another, all in the caller's trace; stages as ever."""
    trace_id, span_id, metadata = parent(7)
    server = serve(script_source("tiny", TinyNet(), tmp_path))
    with grpc.insecure_channel(server.target) as channel:
        stub = oip.Stub(channel)
        stub.ModelInfer(oip.request("tiny", {"input": ROW}, ["heatmap"], id="alone"), metadata=metadata)
        streamed = [oip.request("tiny", {"input": ROW}, ["heatmap"], id=name) for name in ("first", "second")]
        assert 4 == len(list(stub.ModelStreamInfer(iter(streamed), metadata=metadata)))
        stub.ServerLive(oip.message("ServerLiveRequest"), metadata=metadata)

    def calls() -> dict[object, Span]:
        told = [
            span for span in traced.spans() if span.attributes.get("rpc.service") == "inference.GRPCInferenceService"
        ]
        return {span.attributes.get("camserve.request_id", span.name): span for span in told}

    stream = "inference.GRPCInferenceService/ModelStreamInfer"
    await until(lambda: {"alone", "first", "second", stream} <= set(calls()))
    found = calls()
    assert {"alone", "first", "second", stream} == set(found)
    assert {(trace_id, span_id)} == {(span.trace_id, span.parent_id) for span in found.values()}
    for name in ("alone", "first", "second"):
        await until(lambda name=name: len(children(traced.spans(), found[name])) == 4)
        stages = [span.name for span in children(traced.spans(), found[name])]
        assert ["decode", "queue", "device", "encode"] == stages


async def test_requests_of_the_open_inference_protocol_are_logged_alike(serve, tmp_path):
    """One line for each request, of a stream too, with id, model and lane; the stream has one of its own; probes have none."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), log_level="info")
    with structlog.testing.capture_logs() as lines, grpc.insecure_channel(server.target) as channel:
        stub = oip.Stub(channel)
        asked = [
            oip.request("tiny", {"input": ROW}, id=name, parameters={"priority": 3}) for name in ("alone", "streamed")
        ]
        stub.ModelInfer(asked[0])
        list(stub.ModelStreamInfer(iter(asked[1:])))
        stub.ServerLive(oip.message("ServerLiveRequest"))

        def told() -> dict[str, dict[str, object]]:
            calls = [line for line in lines if line["event"] == "call" and line["log_level"] == "info"]
            return {str(line.get("request_id", line["rpc"])): line for line in calls}

        stream = "/inference.GRPCInferenceService/ModelStreamInfer"
        await until(lambda: {"alone", "streamed", stream} <= set(told()))

    assert {"alone", "streamed", stream} == set(told())
    assert {("tiny", "1", "bulk", "OK")} == {
        tuple(told()[name][key] for key in ("model", "version", "lane", "code")) for name in ("alone", "streamed")
    }

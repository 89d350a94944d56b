"""Whatever a caller sends, every call ends with a status that the contract tells, and the server answers the next one.

Requests are drawn by `tests/support/strange.py`. The short form sends one at a time, so that hypothesis can make what fails
small; the long one keeps many under way on one connection. What was found stands in tests of its own, named for what it shows.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import grpc
import hypothesis
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from support.kinds import sources_of_kinds
from support.nets import TinyNet
from support.servers import Metrics, script_source, settings, until
from support.strange import PIXELS, SPARE, Case, cases, picture_cases

from camserve.client import Client, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.engine.hooked import HookedProgram
from camserve.v1 import explanation_service_pb2 as service_pb2

# The contract tells each reason's status as the last word of its comment.
_ERRORS = (Path(__file__).parents[2] / "protos/camserve/v1/errors.proto").read_text(encoding="utf-8")
DOCUMENTED = {reason: code for code, reason in re.findall(r"([A-Z_]+)\.\n  ERROR_REASON_(\w+) = \d+;", _ERRORS)}
CODES = {code.value[0]: code.name for code in grpc.StatusCode}
GOOD = TensorInput(np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32))
EXPLAIN = "/camserve.v1.ExplanationService/Explain"
SECONDS = 30.0
IN_FLIGHT = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a call ended.

    Attributes:
        code: of gRPC.
        text: beside it.
        details: a google.rpc.Status, serialised, or nothing.
        messages: what came before.
    """

    code: str
    text: str = ""
    details: bytes = b""
    messages: tuple[bytes, ...] = ()


class Line:
    """One connection, with a loop of its own for the calls under way on it."""

    def __init__(self, target: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="line")
        self._thread.start()
        self._channel = asyncio.run_coroutine_threadsafe(self._connect(target), self._loop).result()

    def send(self, case: Case) -> Future[End]:
        """Begins a call."""
        return asyncio.run_coroutine_threadsafe(self._send(case), self._loop)

    def close(self) -> None:
        """Ends connection and loop."""
        asyncio.run_coroutine_threadsafe(self._channel.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connect(self, target: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(target, [("grpc.max_receive_message_length", -1)])

    async def _send(self, case: Case) -> End:
        try:
            if case.rpc == EXPLAIN:
                call = self._channel.unary_stream(case.rpc)(case.message, timeout=SECONDS)
                return End(code="OK", messages=tuple([message async for message in call]))
            return End(code="OK", messages=(await self._channel.unary_unary(case.rpc)(case.message, timeout=SECONDS),))
        except grpc.aio.AioRpcError as error:
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            return End(code=error.code().name, text=error.details() or "", details=details)


def told(status: status_pb2.Status) -> tuple[str, str]:
    """Code and reason of a status, which must be as the contract has them."""
    infos = [
        error_details_pb2.ErrorInfo() for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)
    ]
    assert 1 == len(infos), "there must be one ErrorInfo"
    assert status.details[0].Unpack(infos[0])
    reason, code = infos[0].reason, CODES[status.code]
    assert "camserve" == infos[0].domain
    assert DOCUMENTED.get(reason) == code, f"{code} {reason}: {status.message}"
    # A model that is given numbers as large as there are may well give infinity.
    is_overflow = reason == "MODEL_FAILED" and "not finite" in status.message
    assert is_overflow or code != "INTERNAL", f"{reason}: {status.message}"
    assert status.message
    return code, reason


def judged(case: Case, end: End) -> str:
    """What came of a call, in a word or two; fails where the contract does not tell of it."""
    try:
        return _judged(case, end)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{end.code} {end.text}\n{case.rpc} {case.message.hex()}") from error


def _judged(case: Case, end: End) -> str:
    if end.code == "OK" and case.rpc == EXPLAIN:
        events = [service_pb2.ExplainResponse.FromString(message) for message in end.messages]
        kinds = [event.WhichOneof("event") for event in events]
        assert ("prediction", "summary") == (kinds[0], kinds[-1])
        failed = [told(event.spec_error.status)[1] for event in events if event.WhichOneof("event") == "spec_error"]
        return "OK, but " + failed[0] if failed else "OK"
    if end.code == "OK":
        return "OK"
    if not end.details:
        # gRPC itself says no more than this.
        assert end.code == "DEADLINE_EXCEEDED" or "larger than max" in end.text
        return f"{end.code} of gRPC"
    status = status_pb2.Status.FromString(end.details)
    code, reason = told(status)
    assert (end.code, end.text) == (code, status.message)
    return reason


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundServer]:
    """A model of each kind, behind limits that cases reach."""
    folder = tmp_path_factory.mktemp("models")
    labels = ("good", "a label", "a label", "x")
    sources = [script_source(name, TinyNet(), folder, labels=labels) for name in ("classification", SPARE)]
    sources += sources_of_kinds(folder)
    config = settings(max_image_pixels=PIXELS, max_request_bytes=1 << 20, max_specs=8, slice_seconds=0.02)
    with BackgroundServer(config, sources) as server:
        yield server


@pytest.fixture(scope="module")
def line(server: BackgroundServer) -> Iterator[Line]:
    """A connection to it."""
    line = Line(server.target)
    yield line
    line.close()


@pytest.fixture(autouse=True)
def _sound(server: BackgroundServer) -> Iterator[None]:
    """Before and after each test the server gives the same map, holds nobody, and its models have nobody's hooks."""
    digest = answered(server)
    yield
    assert digest == answered(server)
    asyncio.run(until(lambda: Metrics(server).value("camserve_requests_in_flight") == 0))
    assert 0 == Metrics(server).value("camserve_queue_depth")
    assert 0 == Metrics(server).value("camserve_queue_bytes")
    for slot in server.app.repository.slots():
        if slot.served is not None and isinstance(slot.served.program, HookedProgram):
            modules = list(slot.served.program._module.modules())
            assert not [module for module in modules if module._forward_hooks or module._forward_pre_hooks]


def answered(server: BackgroundServer) -> str:
    """Sends a good request; the digest of its map."""
    with Client(server.target, retries=0) as client:
        return client.explain(GOOD, model="classification", specs=["grad-cam"]).heatmaps[0].raw_sha256


QUICK = hypothesis.settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), max_examples=300
)


@QUICK
@given(case=cases())
def test_strange_requests_end_as_the_contract_tells(line: Line, case: Case):
    """Any value of any field, and bytes that are no message, are answered or refused with a documented status and reason."""
    judged(case, line.send(case).result())


@QUICK
@given(case=picture_cases())
def test_damaged_pictures_end_as_the_contract_tells(line: Line, case: Case):
    """Any picture of which a part is missing, doubled or changed is answered or refused likewise."""
    judged(case, line.send(case).result())


SHARDS = 40
CASES = 2_500


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_hundred_thousand_strange_requests(server: BackgroundServer, line: Line, shard: int):
    """The same for 100 000 requests, a quarter of them damaged pictures, with 32 under way at any time."""
    ends: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    room = threading.Semaphore(IN_FLIGHT)

    def note(case: Case, done: Future[End]) -> None:
        try:
            ends[judged(case, done.result())] += 1
        except AssertionError as error:
            wrong.append(str(error))
        finally:
            room.release()

    @hypothesis.seed(shard)
    @hypothesis.settings(QUICK, derandomize=False, max_examples=CASES, phases=[Phase.generate])
    @given(case=st.one_of(cases(), cases(), cases(), picture_cases()))
    def send(case: Case) -> None:
        room.acquire()
        line.send(case).add_done_callback(lambda done: note(case, done))

    started = time.perf_counter()
    send()
    for _ in range(IN_FLIGHT):
        room.acquire()
    seconds = time.perf_counter() - started

    print(f"\n{sum(ends.values())} requests, {sum(ends.values()) / seconds:.0f} a second: {dict(ends.most_common())}")  # noqa: T201 - told in docs
    assert [] == wrong
    assert ends.total() >= CASES
    assert ends["OK"]

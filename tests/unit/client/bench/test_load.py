from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator

import grpc
import pytest

from camserve.client import Spec, Unavailable
from camserve.client.bench import (
    NOT_SENT,
    Closed,
    Connections,
    Failure,
    Mix,
    Open,
    Progress,
    Window,
    figures_of,
    input_bytes,
    kind,
    run_step,
)
from camserve.v1 import explanation_service_pb2
from tests.unit.client.conftest import Peer, prediction, status, summary, when_left


@pytest.fixture
def mix(png: bytes) -> Mix:
    """One kind of request about one image."""
    return Mix(kinds=(kind("surface", ["grad-cam"]),), inputs=(input_bytes(png),))


class Slow:
    """Answers one request at a time, each in as long as `seconds`; a wait that nobody ends is its only clock."""

    def __init__(self, peer: Peer, seconds: float) -> None:
        self._answer = peer.full_answer
        self._seconds = seconds
        self._turn = threading.Lock()
        self._never = threading.Event()
        peer.answer = self.answer

    def answer(
        self, request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        """Yields what the peer would, late."""
        with self._turn:
            self._never.wait(self._seconds)
            yield from self._answer(request, context)


async def test_a_closed_loop_asks_as_often_as_told_with_as_many_callers(peer: Peer, mix: Mix) -> None:
    """So many requests are recorded, and never more under way than there are callers."""
    async with Connections(peer.target, count=2) as connections:
        step = await run_step(connections, mix, Closed(3), Window(requests=20))

    assert [("OK", 1, 3)] * 20 == [(record.code, record.maps, record.batch_rows) for record in step.records]
    assert peer.most_at_once <= 3
    assert 20 == len(step.due) == len(peer.requests)
    assert step.seconds == max(record.ended for record in step.records)
    for record in step.records:
        assert record.sent is not None
        assert record.first is not None
        assert 0 <= record.intended <= record.sent <= record.first <= record.ended


async def test_a_window_of_seconds_leaves_the_warm_up_out(peer: Peer, mix: Mix) -> None:
    """Warm-up and window are one load; only what fell due in the window counts, and its last answers are waited for."""
    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, Closed(2), Window(seconds=0.3, warm_up_seconds=0.2))

    assert 0.3 == step.seconds
    assert any(record.intended < 0 for record in step.records)
    assert len(step.records) == len(peer.requests)
    # None at all, on a machine that stands still for so long.
    assert [record for record in step.records if 0 <= record.intended < 0.3] == list(step.due)


async def test_the_warm_up_before_counted_requests_ends_first(peer: Peer, mix: Mix) -> None:
    """Ten requests count, however many came before them, and those had all been answered."""
    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, Closed(2), Window(requests=10, warm_up_seconds=0.1))

    assert 10 == len(step.due)
    assert all(record.ended <= 0 for record in step.records if record.intended < 0)


async def test_latency_counts_from_when_a_request_was_due(peer: Peer, mix: Mix) -> None:
    """Coordinated omission cannot hide: against a server that is too slow, each answer is later than the one before."""
    Slow(peer, 0.02)

    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, Open(200.0), Window(requests=40))

    by_answer = sorted(step.records, key=lambda record: record.ended)
    assert {"OK"} == {record.code for record in step.records}
    # 40 answers of 0.02 s each, due within 0.2 s: the later one is answered, the more answers it waits for from then on.
    assert max(record.intended for record in by_answer) < 0.4
    assert all(record.ended >= 0.02 * place for place, record in enumerate(by_answer, start=1))
    assert min(record.latency for record in by_answer[-10:]) > 0.2
    assert figures_of(step).requests_per_second < 60


async def test_what_finds_no_room_is_counted_and_not_sent(peer: Peer, mix: Mix) -> None:
    """The bound on what is under way holds, and what it turned away is due all the same."""
    Slow(peer, 0.05)

    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, Open(400.0, max_in_flight=4), Window(requests=40))

    not_sent = [record for record in step.records if record.code == NOT_SENT]
    figures = figures_of(step)
    assert not_sent
    assert {(None, None, 0.0)} == {(record.sent, record.first, record.latency) for record in not_sent}
    assert 40 == figures.due == len(not_sent) + figures.answered
    assert peer.most_at_once <= 4
    assert len(not_sent) / 40 == pytest.approx(figures.error_share)


async def test_refusals_are_recorded_with_what_the_server_said(peer: Peer, mix: Mix) -> None:
    """Status, reason and the time to come back are in the record."""
    peer.failures.append(status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", retry_after=0.25))
    peer.failures.append(status("NOT_FOUND", "MODEL_NOT_FOUND", "gone"))

    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, Open(100.0), Window(requests=3))

    told = sorted((record.code, record.reason, record.retry_after) for record in step.records)
    assert [("NOT_FOUND", "MODEL_NOT_FOUND", None), ("OK", "", None)] == told[:2]
    assert ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 0.25) == told[2]


@pytest.mark.parametrize(("heeds", "seconds"), [(True, 0.3), (False, 3600.0)])
async def test_a_caller_that_is_turned_away_comes_back_when_asked(peer: Peer, mix: Mix, heeds, seconds) -> None:
    """A caller of a closed loop waits as long as the server asks, unless it is of the other sort; the wait is no latency."""
    peer.failures.append(status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", retry_after=seconds))

    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, Closed(1, heeds_retry_after=heeds), Window(requests=2))

    refused, answered = sorted(step.records, key=lambda record: record.intended)
    assert heeds is (answered.intended - refused.ended >= seconds)
    assert answered.latency == answered.ended - answered.intended


async def test_a_spec_that_fails_is_no_full_answer(peer: Peer, png: bytes) -> None:
    """The call succeeded, but what was asked for did not come."""
    mix = Mix(kinds=(kind("surface", ["grad-cam", Spec("grad-cam", layers=["flat"])]),), inputs=(input_bytes(png),))

    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, Closed(1), Window(requests=1))

    (record,) = step.records
    assert ("OK", 1, (Failure("FAILED_PRECONDITION", "LAYER_UNUSABLE"),)) == (
        record.code,
        record.maps,
        record.spec_errors,
    )
    assert not record.is_ok


async def test_an_answer_that_is_cut_off_is_a_failure(peer: Peer, mix: Mix) -> None:
    """A stream that ends well and lacks its summary is not counted as answered."""
    peer.answer = lambda _request, _context: iter([prediction()])

    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, Closed(1), Window(requests=1))

    assert [("INTERNAL", "STREAM_INCOMPLETE")] == [(record.code, record.reason) for record in step.records]


async def test_a_limit_on_the_call_is_grpcs_own(peer: Peer, mix: Mix) -> None:
    """A request that takes longer than the limit ends with gRPC's status and no reason of camserve's."""
    waiting = threading.Event()

    def hold(
        request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        when_left(context, waiting)
        waiting.wait(120)
        yield summary(request)

    peer.answer = hold
    async with Connections(peer.target, timeout_seconds=0.1) as connections:
        step = await run_step(connections, mix, Closed(1), Window(requests=1))

    assert [("DEADLINE_EXCEEDED", "")] == [(record.code, record.reason) for record in step.records]


@pytest.mark.parametrize("load", [Closed(2), Open(50.0)])
async def test_a_stopped_step_gives_what_it_has(peer: Peer, mix: Mix, load: Closed | Open) -> None:
    """Whoever presses Ctrl-C keeps what was measured, and nothing is left under way."""
    stop, progress = asyncio.Event(), Progress()
    full_answer = peer.full_answer
    loop = asyncio.get_running_loop()
    calls = itertools.count(1)

    def answer(
        request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        if next(calls) == 5:
            loop.call_soon_threadsafe(stop.set)
        yield from full_answer(request, context)

    peer.answer = answer
    async with Connections(peer.target) as connections:
        step = await run_step(connections, mix, load, Window(seconds=60), progress=progress, stop=stop)

    assert not step.is_complete
    assert 0 < step.seconds < 60
    # 60 seconds of them would be thousands.
    assert 3 <= len(step.records) < 1000
    assert (0, len(step.records)) == (progress.in_flight, progress.answered)


async def test_no_server_is_told_when_connecting() -> None:
    """Nothing is sent to an address where nobody listens."""
    with pytest.raises(Unavailable, match="no connection"):
        async with Connections("localhost:1", connect_seconds=0.2):
            pass


@pytest.mark.parametrize(
    "given",
    [{}, {"seconds": 1.0, "requests": 1}, {"seconds": 0.0}, {"requests": 0}, {"seconds": 1, "warm_up_seconds": -1}],
)
def test_a_window_is_seconds_or_requests(given: dict[str, float]) -> None:
    """Neither both nor none, and something must count."""
    with pytest.raises(ValueError, match=r"give seconds|warm_up_seconds"):
        Window(**given)

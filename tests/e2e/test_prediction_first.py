"""The prediction leaves before a map can exist, and work that nobody waits for is not done."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.gated import GATE, gated_source
from support.servers import Metrics, settings, until

from camserve.client import (
    AsyncClient,
    CamserveError,
    Client,
    DeadlineExceeded,
    Heatmap,
    Prediction,
    Spec,
    Summary,
    TensorInput,
    TopK,
)
from camserve.server.background import BackgroundServer

ROW = TensorInput(np.ones((3, 32, 32), np.float32))


@pytest.fixture(scope="module")
def gated_server():
    """A server of the gated model; the gate stands open while it loads."""
    GATE.opened.set()
    with BackgroundServer(settings(max_batch_rows=2, batch_window_seconds=0), [gated_source()]) as server:
        yield server
        GATE.opened.set()


@pytest.fixture
def gate():
    """A closed gate."""
    GATE.reset()
    yield GATE
    GATE.opened.set()


def test_prediction_arrives_before_the_backward_is_allowed(gated_server, gate):
    """The gradient waits for an event that is set only after the prediction was received."""
    with Client(gated_server.target) as client:
        events = client.stream(ROW, model="gated", specs=["grad-cam"])
        first = next(events)
        assert isinstance(first, Prediction)
        assert gate.reached.wait(timeout=120)
        gate.opened.set()
        rest = list(events)

    assert [Heatmap, Summary] == [type(event) for event in rest]


def test_expired_request_is_answered_while_a_pass_runs(gated_server, gate):
    """While the device is held, a request whose own deadline passes is answered promptly with our reason."""
    with Client(gated_server.target) as client:
        holder = client.stream(ROW, model="gated", specs=["grad-cam"])
        next(holder)
        assert gate.reached.wait(timeout=120)
        with pytest.raises(DeadlineExceeded) as caught:
            client.explain(ROW, model="gated", deadline=0.05)
        assert not gate.opened.is_set()
        gate.opened.set()
        list(holder)

    assert "DEADLINE_EXCEEDED" == caught.value.reason


def test_cancelled_requests_are_not_run(gated_server, gate):
    """Eight requests cancelled while they wait add no row to any later pass; the one that stayed is answered."""
    metrics = Metrics(gated_server)
    rows_before = metrics.value("camserve_batch_rows_sum")

    async def run():
        async with AsyncClient(gated_server.target) as client:
            holder = asyncio.create_task(client.explain(ROW, model="gated", specs=["grad-cam"]))
            await asyncio.to_thread(gate.reached.wait, 120)
            leaving = [asyncio.create_task(client.explain(ROW, model="gated", specs=["grad-cam"])) for _ in range(8)]
            staying = asyncio.create_task(client.explain(ROW, model="gated"))
            await until(lambda: metrics.value("camserve_queue_depth") == 9)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            await until(lambda: metrics.value("camserve_queue_depth") == 1)
            gate.opened.set()
            return await asyncio.gather(holder, staying)

    holder, staying = asyncio.run(run())

    assert 2 == metrics.value("camserve_batch_rows_sum") - rows_before
    assert 8 <= metrics.value("camserve_cancelled_total", stage="queue")
    assert 1 == len(holder.heatmaps)
    assert staying.prediction is not None


def test_cancelled_while_on_the_device_stops_before_the_next_gradient(gated_server, gate):
    """Of three targets only the gradient that was running when the caller left is computed."""
    with Client(gated_server.target) as client:
        events = client.stream(ROW, model="gated", specs=[Spec("grad-cam", target=TopK(3))])
        next(events)
        assert gate.reached.wait(timeout=120)
        events.close()
        metrics = Metrics(gated_server)
        asyncio.run(until(lambda: metrics.value("camserve_requests_in_flight") == 0))
        gate.opened.set()
        client.explain(ROW, model="gated")  # Runs after the abandoned pass: the device thread is free again.

    assert 1 == gate.rows_backward


def test_a_deadline_anywhere_ends_with_a_status(demo_server, samples):
    """However close to a message its deadline comes, every request gets the server's own status, with its reason."""

    def ended(place: int) -> str:
        try:
            list(client.stream(samples[0], model="surface", specs=["grad-cam"], deadline=(5 + place % 60) / 1000))
        except CamserveError as error:
            return error.reason or f"no reason: {error}"
        return "OK"

    with Client(demo_server.target, retries=0, timeout=120) as client, ThreadPoolExecutor(4) as pool:
        ends = set(pool.map(ended, range(240)))

    assert ends <= {"OK", "DEADLINE_EXCEEDED", "DEADLINE_UNREACHABLE"}

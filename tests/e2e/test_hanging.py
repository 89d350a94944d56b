"""Servers that really hang, and what probes are told meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.fragile import SLOW, fragile_source, slow
from support.gated import GATE, gated_source
from support.servers import Metrics, settings, until

from camserve.client import AsyncClient, Client, TensorInput
from camserve.server.app import App

ROW = TensorInput(np.zeros((3, 32, 32), np.float32))
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
WATCHED = health_pb2.HealthCheckRequest(service="")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Logging is configured once for a process; other tests start from where they were."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def page(app: App, path: str) -> tuple[int, str]:
    """Status and text of a page of the metrics port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{app.metrics_port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_a_model_that_hangs_flips_liveness_until_it_goes_on(serve, capsys):
    """Health, pages and metrics tell it, the log shows once which requests hang and where; then all is as before."""
    server = serve(fragile_source(slow), stall_seconds=1, log_level="error", log_format="json")
    metrics = Metrics(server)
    SLOW.is_held = True
    try:
        with (
            ThreadPoolExecutor(1) as pool,
            Client(server.target) as client,
            grpc.insecure_channel(server.target) as channel,
        ):
            updates = health_pb2_grpc.HealthStub(channel).Watch(WATCHED)
            assert SERVING == next(updates).status
            asking = pool.submit(client.explain, ROW, model="slow", request_id="held-1")
            assert SLOW.waiting.acquire(timeout=120)

            await until(lambda: page(server.app, "/livez")[0] == 503)
            assert NOT_SERVING == next(updates).status
            hangs = (503, "the device thread hangs in a pass of slow\n")
            assert [hangs, hangs] == [page(server.app, path) for path in ("/livez", "/readyz")]
            assert 1 == metrics.value("camserve_stalled", thread="device")
            assert 0 == metrics.value("camserve_stalled", thread="loop")
            assert 1 < metrics.value("camserve_device_piece_seconds")

            SLOW.is_held = False
            SLOW.turns.release()
            assert "slow" == asking.result(timeout=180).summary.model
            assert SERVING == next(updates).status
            assert [(200, "ok\n")] * 2 == [page(server.app, path) for path in ("/livez", "/readyz")]
            assert 0 == metrics.value("camserve_stalled")
            assert 0 == metrics.value("camserve_device_piece_seconds")
            updates.cancel()
    finally:
        SLOW.is_held = False

    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert ("device stalled", "pass", "slow", ["held-1"]) == tuple(
        line[key] for key in ("event", "at", "model", "request_ids")
    )
    assert "fragile.py" in line["stack"]
    assert "SLOW.turns.acquire" in line["stack"]


async def test_an_event_loop_that_hangs_flips_liveness(serve):
    """The pages answer although nothing else does."""
    server = serve(fragile_source(slow), stall_seconds=1)
    held, reached = threading.Event(), threading.Event()

    async def hold() -> None:
        reached.set()
        held.wait(timeout=180)

    holding = server.run(hold())
    assert reached.wait(timeout=180)
    try:
        await until(lambda: page(server.app, "/livez") == (503, "the event loop does not answer\n"))
        assert (503, "the event loop does not answer\n") == page(server.app, "/readyz")
        assert 1 == Metrics(server).value("camserve_stalled", thread="loop")
    finally:
        held.set()
    holding.result(timeout=180)

    await until(lambda: page(server.app, "/readyz") == (200, "ok\n"))
    assert (200, "ok\n") == page(server.app, "/livez")


async def test_readiness_follows_load_and_drain():
    """Not ready, ready, not ready: who watches is told each, the page tells why, and the server lives all along."""
    GATE.opened.set()
    app = App(settings(), [gated_source()])
    await app.start()

    async def pages() -> list[tuple[int, str]]:
        return [await asyncio.to_thread(page, app, path) for path in ("/readyz", "/livez")]

    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel,
        AsyncClient(f"127.0.0.1:{app.port}") as client,
    ):
        updates = health_pb2_grpc.HealthStub(channel).Watch(WATCHED)
        assert NOT_SERVING == (await updates.read()).status
        assert [(503, "loading\n"), (200, "ok\n")] == await pages()

        await app.load()
        assert SERVING == (await updates.read()).status
        assert [(200, "ok\n"), (200, "ok\n")] == await pages()

        # Somebody inside holds the drain open for as long as we look at it.
        GATE.reset()
        inside = asyncio.create_task(client.explain(ROW, model="gated", specs=["grad-cam"]))
        assert await asyncio.to_thread(GATE.reached.wait, 120)
        draining = asyncio.create_task(app.drain())
        assert NOT_SERVING == (await updates.read()).status
        assert [(503, "draining\n"), (200, "ok\n")] == await pages()
        GATE.opened.set()
        assert 1 == len((await inside).heatmaps)
        assert await draining

"""What one caller may take of a running server: how often it may ask, and how much at once; others are not held up by it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from support import oip
from support.gated import GATE, gated_source
from support.nets import TinyNet
from support.servers import Metrics, script_source, until
from support.vanishing import VanishingProxy

from camserve.client import AsyncClient, Client, Overloaded, TensorInput
from camserve.client.errors import from_rpc_error

ROW = TensorInput(np.zeros((3, 32, 32), np.float32))
EXPLAIN = "/camserve.v1.ExplanationService/Explain"


@pytest.fixture
def seldom(serve, tmp_path):
    """A server that lets a caller ask twice, and then once in a thousand seconds."""
    return serve(script_source("tiny", TinyNet(), tmp_path), caller_requests_per_second=0.001, caller_burst=2)


@pytest.fixture
def other_host(seldom) -> Iterator[str]:
    """The same server, for who comes from another address."""
    with VanishingProxy(seldom.target, source="127.0.0.2") as proxy:
        yield proxy.target


def test_who_asks_too_often_is_refused_until_a_time(seldom, other_host):
    """The third request is refused with its reason and the time of the next; another host is answered as if it were alone."""
    with Client(seldom.target, retries=0) as client, Client(other_host, retries=0) as other:
        for _ in range(2):
            assert client.explain(ROW, model="tiny", specs=["grad-cam"]).heatmaps
        with pytest.raises(Overloaded, match=r"0\.001 times a second") as caught:
            client.explain(ROW, model="tiny")
        assert other.explain(ROW, model="tiny", specs=["grad-cam"]).heatmaps

    assert "RATE_LIMITED" == caught.value.reason
    assert 0 < caught.value.retry_after <= 1000
    assert 1 == Metrics(seldom).value("camserve_rejected_total", reason="RATE_LIMITED")
    assert 1 == Metrics(seldom).value("camserve_requests_total", code="RESOURCE_EXHAUSTED", model="")


def test_each_row_of_a_batch_counts_and_a_batch_is_whole(serve, tmp_path):
    """More rows than there may ever be are told how many may; so many are let in, and then nothing is left."""
    source = script_source("tiny", TinyNet(), tmp_path)
    server = serve(source, caller_requests_per_second=0.001, caller_burst=4, caller_concurrency=3)
    with grpc.insecure_channel(server.target) as channel:

        def ask(rows: int) -> None:
            oip.Stub(channel).ModelInfer(oip.request("tiny", {"input": np.zeros((rows, 3, 32, 32), np.float32)}))

        with pytest.raises(grpc.RpcError, match="at most 3 rows") as caught:
            ask(4)
        assert grpc.StatusCode.RESOURCE_EXHAUSTED is caught.value.code()
        assert from_rpc_error(caught.value).retry_after is None
        ask(3)
        with pytest.raises(grpc.RpcError, match="caller_burst"):
            ask(1)


def test_connections_of_a_host_are_one_caller(seldom):
    """Who opens a new connection for each request is counted all the same."""
    for _ in range(2):
        with Client(seldom.target, retries=0) as client:
            client.explain(ROW, model="tiny")
    with Client(seldom.target, retries=0) as client, pytest.raises(Overloaded, match="RATE_LIMITED"):
        client.explain(ROW, model="tiny")


def test_a_refused_message_is_not_parsed(seldom):
    """Bytes that are no request are told as such while there is an allowance, and are not looked at when there is none."""
    with grpc.insecure_channel(seldom.target) as channel:
        call, reasons = channel.unary_stream(EXPLAIN), []
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                list(call(b"\xff" * 1000, timeout=60))
            reasons.append(from_rpc_error(caught.value).reason)

    assert ["FIELD_INVALID", "FIELD_INVALID", "RATE_LIMITED"] == reasons


def test_questions_that_ask_no_model_are_not_counted(seldom):
    """Cards, lists and probes cost nothing worth counting."""
    with Client(seldom.target, retries=0) as client:
        for _ in range(5):
            assert client.models()
            assert "tiny" == client.model("tiny").name
        assert client.explain(ROW, model="tiny").prediction


async def test_our_client_waits_as_long_as_it_is_told(serve, tmp_path):
    """Of three requests at once two wait for their turn, and all are answered, at the rate that is allowed."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), caller_requests_per_second=2, caller_burst=1)
    async with AsyncClient(server.target, retries=10) as client:
        started = time.monotonic()
        results = await asyncio.gather(*(client.explain(ROW, model="tiny") for _ in range(3)))
        took = time.monotonic() - started

    assert all(result.prediction for result in results)
    assert 1.0 <= took + time.get_clock_info("monotonic").resolution


async def test_one_caller_may_have_so_many_under_way(serve):
    """The third at once is refused; another host's is taken in, and the first caller's again when one of them has ended."""
    GATE.opened.set()
    server = serve(gated_source(), caller_concurrency=2)
    GATE.reset()
    metrics = Metrics(server)
    with VanishingProxy(server.target, source="127.0.0.2") as proxy:
        async with AsyncClient(server.target, retries=0) as client, AsyncClient(proxy.target, retries=0) as other:
            calls = [asyncio.create_task(client.explain(ROW, model="gated", specs=["grad-cam"])) for _ in range(2)]
            await until(lambda: metrics.value("camserve_requests_in_flight") == 2)
            with pytest.raises(Overloaded, match="2 requests under way") as caught:
                await client.explain(ROW, model="gated")
            calls.append(asyncio.create_task(other.explain(ROW, model="gated", specs=["grad-cam"])))
            await until(lambda: metrics.value("camserve_requests_in_flight") == 3)
            GATE.opened.set()
            assert all([(await call).heatmaps for call in calls])
            assert (await client.explain(ROW, model="gated")).prediction

    assert "TOO_MANY_CONCURRENT" == caught.value.reason
    assert 0 < caught.value.retry_after
    assert 1 == metrics.value("camserve_rejected_total", reason="TOO_MANY_CONCURRENT")
    assert 0 == server.app.turnstile.remembered


async def test_who_leaves_gives_the_place_back(serve):
    """A caller whose requests were cancelled may ask again."""
    GATE.opened.set()
    server = serve(gated_source(), caller_concurrency=1)
    GATE.reset()
    metrics = Metrics(server)
    async with AsyncClient(server.target, retries=0) as client:
        call = asyncio.create_task(client.explain(ROW, model="gated", specs=["grad-cam"]))
        await until(lambda: metrics.value("camserve_requests_in_flight") == 1)
        call.cancel()
        await until(lambda: server.app.turnstile.remembered == 0)
        GATE.opened.set()

        assert (await client.explain(ROW, model="gated")).prediction

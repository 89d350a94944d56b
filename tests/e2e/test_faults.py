"""What breaks under a server, and what is left of it: who was refused or left is forgotten, neighbours are answered."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import io
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from support.fragile import SLOW, fragile_source, slow
from support.held import held_process
from support.load import measuring
from support.nets import FailsOnBrightRows, TinyNet
from support.servers import Metrics, script_source, until
from support.vanishing import VanishingProxy

from camserve.client import CamserveError, Client, DeadlineExceeded, Spec, TensorInput
from camserve.server import jobs
from camserve.server.background import BackgroundServer
from camserve.v1 import explanation_service_pb2 as service_pb2

DARK = np.zeros((3, 32, 32), np.float32)
BRIGHT = DARK + 3


def png(side: int) -> bytes:
    """A black square."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def is_refused(client: Client) -> None:
    """More pixels than are taken."""
    with pytest.raises(Exception, match="over the limit"):
        client.explain(png(8000), model="moody")


def is_corrupt(client: Client) -> None:
    """Found out in a worker thread."""
    with pytest.raises(Exception, match="cannot be decoded"):
        client.explain(png(64)[:-20], model="moody")


def is_too_bright(client: Client) -> None:
    """Fails on the device."""
    with pytest.raises(Exception, match="too bright for me"):
        client.explain(TensorInput(BRIGHT), model="moody", specs=["grad-cam"])


def is_late(client: Client) -> None:
    """Its own deadline passes."""
    with pytest.raises(Exception, match="deadline"):
        client.explain(TensorInput(DARK), model="moody", specs=[Spec("ss-cam", samples=9000)], deadline=0.3)


def leaves(client: Client) -> None:
    """Cancels after the prediction."""
    with contextlib.closing(
        client.stream(TensorInput(DARK), model="moody", specs=[Spec("ss-cam", samples=9000)])
    ) as events:
        next(events)


def is_answered(client: Client) -> None:
    """Gets its map."""
    assert client.explain(png(64), model="moody", specs=["grad-cam"]).heatmaps


@pytest.mark.parametrize("ends", [is_refused, is_corrupt, is_too_bright, is_late, leaves, is_answered])
def test_nothing_of_a_request_is_kept(serve: Callable[..., BackgroundServer], tmp_path, ends):
    """However a request ends, its picture is not kept until somebody collects garbage: a server is asked thousands a second."""
    server = serve(script_source("moody", FailsOnBrightRows(), tmp_path))
    metrics = Metrics(server)
    # With the collector at rest: what is gone was let go of.
    with Client(server.target, retries=0) as client, measuring():
        # What other tests of this process hold on to says nothing here.
        before = {id(job): job for job in jobs_in_memory()}
        ends(client)
        asyncio.run(until(lambda: metrics.value("camserve_requests_in_flight") == 0))
        # The device is done with it as well.
        server.run(idle(server)).result(120)
        left = [job for job in jobs_in_memory() if id(job) not in before]

    assert [] == left


def jobs_in_memory() -> list[jobs.Job]:
    """All that are referred to, or would be collected only some time."""
    return [kept for kept in gc.get_objects() if type(kept) is jobs.Job]


async def idle(server: BackgroundServer) -> None:
    """Returns when the device has nothing more to do."""
    while server.app._runner.has_amplified:
        await server.app._runner.call(lambda: None)
    await server.app._runner.call(lambda: None)


EXPLAIN = "/camserve.v1.ExplanationService/Explain"
UNREADABLE = {
    "cut short": b"\x0a\x07surf",
    "not UTF-8": b"\x0a\x02\xff\xfe",
    "random": bytes(range(200, 256)),
    "a group that never ends": b"\x0b",
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_message_that_cannot_be_read(demo_server, message):
    """Bytes that are no request are the sender's fault, with our reason, and not UNKNOWN as gRPC has it."""
    with grpc.insecure_channel(demo_server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(EXPLAIN)(UNREADABLE[message]))

    status = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID") == (caught.value.code(), info.reason)
    assert "no request of /camserve.v1.ExplanationService/Explain" in status.message


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
RUBBISH = {
    "HTTP/1.1": b"GET /metrics HTTP/1.1\r\nHost: camserve\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "random": np.random.default_rng(0).bytes(4096),
    "a frame of 16 MB": PREFACE + b"\xff\xff\xff\0\0\0\0\0\1",
    "headers that cannot be unpacked": PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\4\1\5\0\0\0\1\xff\xff\xff\xff",
    "half a preface": PREFACE[:9],
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_port_that_is_sent_what_is_no_http2(demo_server, client, kind):
    """A scanner, a browser or a proxy that takes the port for something else is hung up on; callers notice nothing."""
    with socket.create_connection(("127.0.0.1", demo_server.app.port), timeout=60) as stranger:
        stranger.sendall(RUBBISH[kind])
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1 << 16):
                pass

    assert client.explain(np.zeros((160, 160, 3), np.uint8), model="surface", specs=["grad-cam"]).heatmaps


@pytest.fixture
def held(serve: Callable[..., BackgroundServer], request: pytest.FixtureRequest) -> Iterator[BackgroundServer]:
    """A server whose device makes no forward until the test ends."""
    server = serve(fragile_source(slow, max_batch=2), max_requests=2, **getattr(request, "param", {}))
    SLOW.is_held = True
    yield server
    SLOW.is_held = False
    SLOW.turns.release(1000)
    server.run(idle(server)).result(120)
    while SLOW.turns.acquire(blocking=False) or SLOW.waiting.acquire(blocking=False):
        pass


def inside(server: BackgroundServer, count: int) -> None:
    """Waits until so many are past the door."""
    asyncio.run(until(lambda: Metrics(server).value("camserve_requests_in_flight") == count))


# It asks each second who is still there.
@pytest.mark.parametrize(
    "held", [{"keepalive_seconds": 1, "keepalive_timeout_seconds": 1}], indirect=True, ids=["asks"]
)
def test_caller_that_vanishes_without_a_word_loses_its_place(held):
    """A connection on which nothing comes or goes any more, and that nobody closed, is found out; its request is given up.

    The device is held and the caller has no deadline, so that nothing but the question whether it is there can free the place.
    """
    with (
        VanishingProxy(held.target) as proxy,
        Client(proxy.target, retries=0, timeout=None) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(client.explain, TensorInput(DARK), model="slow", specs=["grad-cam"])
        inside(held, 1)
        proxy.vanish()
        inside(held, 0)
        client.close()
        with pytest.raises(CamserveError):
            asked.result(180)


KILLED = """
import sys, numpy
from camserve.client import Client, TensorInput
with Client(sys.argv[1]) as client:
    client.explain(TensorInput(numpy.zeros((3, 32, 32), numpy.float32)), model="slow", specs=["grad-cam"])
"""


def test_caller_that_is_killed_loses_its_place(held):
    """A caller's process that is killed while its request is on the device, and another's that waits, leave nobody inside."""
    callers = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, held.target]) for _ in range(2)]  # noqa: S603
    inside(held, 2)
    for caller in callers:
        caller.kill()
        caller.wait()
    inside(held, 0)


def test_reader_that_stops_without_a_deadline_loses_its_place(serve, tmp_path):
    """Who reads one message and no more, and set no time, is cut off after `write_seconds`, and is told why."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), write_seconds=1, max_requests=1)
    image = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    # Nine megabytes each, which do not compress: more than the buffers on the way can hold.
    specs = [Spec("grad-cam", encoding="float32", size="source", rectify=False, target=index % 4) for index in range(8)]
    with Client(server.target, retries=0, timeout=None) as client:
        events = client.stream(image, model="tiny", specs=specs)
        next(events)
        inside(server, 0)
        assert client.explain(TensorInput(DARK), model="tiny").prediction
        with pytest.raises(DeadlineExceeded, match="it was not read"):
            list(events)


def newcomer(target: str, seconds: float) -> str:
    """Asks on a connection of its own; how it ended."""
    request = service_pb2.ExplainRequest(
        model="held", tensor={"data_type": "DATA_TYPE_FLOAT32", "shape": DARK.shape, "data": DARK.tobytes()}
    )
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            answer = channel.unary_stream(EXPLAIN)(request.SerializeToString(), timeout=seconds, wait_for_ready=True)
            return f"{len(list(answer))} messages"
        except grpc.RpcError as error:
            return error.code().name


def test_file_descriptors_that_run_out(tmp_path: Path):
    """Where no connection can be opened any more, those that are open go on; when some close, new ones are taken again."""
    with held_process(tmp_path) as held, Client(held.served.target, retries=0) as known:
        ask = functools.partial(known.explain, TensorInput(DARK), model="held", specs=["grad-cam"])
        digest = ask().heatmaps[0].raw_sha256
        server = psutil.Process(held.served.pid)
        most = server.num_fds() + 8
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, hard))
        with contextlib.ExitStack() as crowd:
            for _ in range(16):
                crowd.enter_context(socket.create_connection(("127.0.0.1", held.served.port), timeout=30))
            asyncio.run(until(lambda: server.num_fds() >= most))
            assert newcomer(held.served.target, 3) in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
            assert digest == ask().heatmaps[0].raw_sha256
        assert "2 messages" == newcomer(held.served.target, 60)
        assert digest == ask().heatmaps[0].raw_sha256

"""What breaks under a server, and what is left of it: who was refused or left is forgotten, neighbours are answered."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from support.nets import FailsOnBrightRows
from support.servers import Metrics, script_source, until

from camserve.client import Client, Spec, TensorInput
from camserve.server import jobs
from camserve.server.background import BackgroundServer

DARK = np.zeros((3, 32, 32), np.float32)
BRIGHT = DARK + 3


def png(side: int) -> bytes:
    """A black square."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in a `with` block: what is gone within it was let go of."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
    with Client(server.target, retries=0) as client, uncollected():
        ends(client)
        asyncio.run(until(lambda: metrics.value("camserve_requests_in_flight") == 0))
        # The device is done with it as well.
        server.run(idle(server)).result(30)
        left = [kept for kept in gc.get_objects() if type(kept) is jobs.Job]

    assert [] == left


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

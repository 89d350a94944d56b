"""Each limit of gRPC's that we set acts: gRPC takes any name for an option, and says nothing to those that it does not know."""

from __future__ import annotations

import contextlib
import time

import grpc
import numpy as np
import pytest
from support.frames import EXPLAIN, Kind, RawConnection
from support.gated import GATE, gated_source
from support.nets import TinyNet
from support.servers import script_source

from camserve.client import Client, TensorInput
from camserve.server.connections import most_connections
from camserve.v1 import explanation_service_pb2, input_pb2, model_service_pb2

ROW = TensorInput(np.zeros((3, 32, 32), np.float32))
LIST = "/camserve.v1.ModelService/ListModels"
# Either of them, by how soon a client has confirmed that it was told.
REFUSED_STREAM, ENHANCE_YOUR_CALM = 7, 11
MAX_CONCURRENT_STREAMS = 3


@pytest.fixture
def serve_tiny(serve, tmp_path):
    """Serves a small network with some settings."""
    return lambda **changes: serve(script_source("tiny", TinyNet(), tmp_path), **changes)


def settings_of(connection: RawConnection) -> dict[int, int]:
    """What the server tells of itself first."""
    for found in connection.frames(60):
        if found.kind == Kind.SETTINGS:
            pairs = [found.payload[place : place + 6] for place in range(0, len(found.payload), 6)]
            return {int.from_bytes(pair[:2], "big"): int.from_bytes(pair[2:], "big") for pair in pairs}
    return {}


def list_models(target: str, *metadata: tuple[str, str]) -> grpc.StatusCode:
    """The status of a cheap call with some metadata."""
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(LIST)
        try:
            call(model_service_pb2.ListModelsRequest().SerializeToString(), metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("limit", [8192, 65536])
def test_metadata_has_one_limit(serve_tiny, limit):
    """What is below passes every time, what is above is refused every time, in one entry or in many."""
    server = serve_tiny(max_metadata_bytes=limit)
    below, above = ("token", "x" * (limit - 1000)), ("token", "x" * limit)
    many = [(f"entry-{number}", "x" * 100) for number in range(limit // 100)]

    assert {grpc.StatusCode.OK} == {list_models(server.target, below) for _ in range(5)}
    assert {grpc.StatusCode.RESOURCE_EXHAUSTED} == {list_models(server.target, above) for _ in range(5)}
    assert grpc.StatusCode.RESOURCE_EXHAUSTED == list_models(server.target, *many)


def test_a_connection_has_so_many_calls(serve_tiny):
    """It is told how many, and refused those beyond; what it has is left alone."""
    server = serve_tiny(max_connection_streams=3)
    with RawConnection(server.target) as connection:
        assert 3 == settings_of(connection)[MAX_CONCURRENT_STREAMS]
        for number in range(5):
            connection.call(EXPLAIN, 1 + 2 * number)
        refused = [connection.first(Kind.RST_STREAM) for _ in range(2)]

    assert [7, 9] == [found.stream for found in refused]
    assert {found.error for found in refused} <= {REFUSED_STREAM, ENHANCE_YOUR_CALM}


def test_a_connection_that_says_nothing_is_closed(serve_tiny):
    """Whether it begins to greet or not."""
    server = serve_tiny(handshake_seconds=0.5)
    with RawConnection(server.target, greets=False) as silent, RawConnection(server.target, greets=False) as half:
        half.send(b"PRI * HTTP/2.0\r\n")

        assert silent.is_closed_within(60)
        assert half.is_closed_within(60)


def test_a_connection_without_calls_is_closed(serve_tiny):
    """With a word about why; our client connects anew and notices nothing."""
    server = serve_tiny(idle_connection_seconds=0.5)
    with RawConnection(server.target) as idle, Client(server.target, retries=0) as client:
        assert client.explain(ROW, model="tiny").prediction
        told = idle.first(Kind.GOAWAY)
        assert idle.is_closed_within(60)
        assert client.explain(ROW, model="tiny").prediction

    assert told.payload.endswith(b"connection idle")


def test_an_old_connection_takes_no_more_calls(serve_tiny):
    """Its caller is told to connect anew, then it is closed; no call of our client fails meanwhile."""
    server = serve_tiny(connection_age_seconds=0.3, connection_age_grace_seconds=60)
    with RawConnection(server.target) as old, Client(server.target) as client:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert client.explain(ROW, model="tiny").prediction
        told = old.first(Kind.GOAWAY)
        assert old.is_closed_within(60)

    assert told.payload.endswith(b"max_age")


def test_there_are_so_many_connections(serve_tiny):
    """One more is closed at once; when somebody leaves, there is room again."""
    server = serve_tiny(max_connections=3)
    with contextlib.ExitStack() as open_ones:
        taken = [open_ones.enter_context(RawConnection(server.target)) for _ in range(3)]
        assert all(settings_of(connection) for connection in taken)
        with RawConnection(server.target) as further:
            assert further.is_closed_within(60)
        taken[0].close()
        # Tries again until the server has read that somebody left.
        with Client(server.target, timeout=120, retries=100) as client:
            assert client.explain(ROW, model="tiny").prediction


@pytest.mark.parametrize(("wanted", "open_files", "most"), [(4096, 1 << 20, 4096), (4096, 1024, 512), (1, 1, 1)])
def test_files_are_left_for_other_things(wanted, open_files, most):
    """Connections never take more than half of what the process may open."""
    assert most == most_connections(wanted, open_files)


@pytest.fixture
def waiting():
    """A connection with a call that goes on without a word, on a server with some settings."""
    with contextlib.ExitStack() as stack:

        def begin(server) -> RawConnection:
            connection = stack.enter_context(RawConnection(server.target))
            tensor = input_pb2.Tensor(
                data_type=input_pb2.DATA_TYPE_FLOAT32, shape=(3, 32, 32), data=bytes(4 * 3 * 32 * 32)
            )
            request = explanation_service_pb2.ExplainRequest(model="gated", tensor=tensor, specs=[{"method": 2}])
            message = request.SerializeToString()
            connection.call(EXPLAIN, 1)
            connection.data(1, b"\x00" + len(message).to_bytes(4, "big") + message, ends=True)
            assert GATE.reached.wait(60)
            # The prediction is data, and data forgive pings.
            assert connection.first(Kind.DATA)
            return connection

        yield begin
        GATE.opened.set()


def pings_until_cut_off(connection: RawConnection, count: int) -> int:
    """How many pings a server answers, each sent a while after the one before was answered."""
    for answered in range(count):
        with contextlib.suppress(OSError):
            connection.ping()
        found = connection.first(Kind.PING)
        if found is None:
            return answered
        time.sleep(0.02)  # Time itself is what this is about.
    return count


def test_who_pings_as_often_as_it_may_is_let_be(serve, waiting):
    """Also in a call of which nothing is heard for a long time, where gRPC by itself would allow a ping in five minutes."""
    GATE.opened.set()
    server = serve(gated_source(), min_ping_seconds=0.01)
    GATE.reset()

    assert 15 == pings_until_cut_off(waiting(server), 15)


def test_who_pings_too_often_is_cut_off(serve, waiting):
    """After two warnings that nobody hears."""
    GATE.opened.set()
    server = serve(gated_source(), min_ping_seconds=100)
    GATE.reset()
    connection = waiting(server)

    assert 15 > pings_until_cut_off(connection, 15)


def test_an_idle_peer_that_vanished_is_found_out(serve_tiny):
    """It has no call, and answers no ping."""
    server = serve_tiny(keepalive_seconds=1, keepalive_timeout_seconds=0.5)
    with RawConnection(server.target, answers=False) as vanished:
        assert vanished.is_closed_within(60)


def test_a_message_beyond_the_limit_is_refused(serve_tiny):
    """Sent as it is, or packed and only large when it is unpacked."""
    server = serve_tiny(max_request_bytes=1 << 16)
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_stream(EXPLAIN)
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            with pytest.raises(grpc.RpcError, match="larger than max") as caught:
                list(call(bytes(1 << 20), compression=compression, timeout=60))
            assert grpc.StatusCode.RESOURCE_EXHAUSTED == caught.value.code()

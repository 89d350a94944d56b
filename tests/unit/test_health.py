"""The health service on a real server: what probes and balancers are told."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve.server.health import Health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def health() -> Health:
    """A server's health before anything is loaded."""
    return Health()


@pytest.fixture
async def stub(health) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    """A client of the service."""
    server = grpc.aio.server()
    health.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


def asked(service: str = "") -> health_pb2.HealthCheckRequest:
    """A question about one name."""
    return health_pb2.HealthCheckRequest(service=service)


async def told(watch: grpc.aio.UnaryStreamCall) -> int:
    """The next status that a watcher is told."""
    return (await watch.read()).status


async def test_an_unknown_name_is_not_found(stub):
    """The protocol wants NOT_FOUND from Check."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(asked("camserve/nothing"))

    assert grpc.StatusCode.NOT_FOUND is caught.value.code()


async def test_watch_follows_a_name_that_is_not_there_yet(health, stub):
    """SERVICE_UNKNOWN first, and what becomes of it later, on the same stream."""
    watch = stub.Watch(asked("camserve/part"))

    assert UNKNOWN == await told(watch)
    await health.set_model("part", is_serving=False)
    assert NOT_SERVING == await told(watch)
    await health.set_model("part", is_serving=True)
    assert SERVING == await told(watch)


async def test_one_watcher_that_leaves_takes_nothing_from_the_others(health, stub):
    """Balancers come and go; the one that stays is told of the drain."""
    await health.set_server(is_serving=True)
    stays, leaves = stub.Watch(asked()), stub.Watch(asked())
    assert [SERVING, SERVING] == [await told(stays), await told(leaves)]
    leaves.cancel()
    # The server has dealt with the cancellation by the time it answers a later call on the same connection.
    await stub.Check(asked())

    await health.drain()

    assert NOT_SERVING == await told(stays)


async def test_nothing_serves_while_the_server_hangs(health, stub):
    """Server, services and models are NOT_SERVING during a stall, and as they were set after it, whatever was set meanwhile."""
    await health.set_server(is_serving=True)
    await health.set_model("old", is_serving=True)
    watch = stub.Watch(asked())
    assert SERVING == await told(watch)

    health.set_stall("the device thread hangs")
    await health.set_model("new", is_serving=True)

    assert NOT_SERVING == await told(watch)
    names = ["", "camserve.v1.ExplanationService", "camserve.v1.ModelService", "camserve/old", "camserve/new"]
    assert [NOT_SERVING] * 5 == [(await stub.Check(asked(name))).status for name in names]
    assert "the device thread hangs" == health.why_not_ready()

    health.set_stall("")

    assert SERVING == await told(watch)
    assert [SERVING] * 5 == [(await stub.Check(asked(name))).status for name in names]
    assert "" == health.why_not_ready()


async def test_a_drain_is_for_good(health, stub):
    """Nothing that is set later makes a draining server ready."""
    assert "loading" == health.why_not_ready()
    await health.set_server(is_serving=True)
    await health.drain()

    await health.set_server(is_serving=True)
    health.set_stall("")

    assert NOT_SERVING == (await stub.Check(asked())).status
    assert "draining" == health.why_not_ready()

"""What others ask to know whether we are well: `grpc.health.v1` for probes and balancers, and the metrics page for Prometheus."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import start_http_server

from camserve.server.metrics import Metrics

__all__ = ["Health", "MetricsPage"]

SERVICES = ("camserve.v1.ExplanationService", "camserve.v1.ModelService")


class Health:
    """The standard health service: one status for the whole server (""), each service, and `camserve/<model>`.

    Unknown names get NOT_FOUND from Check and SERVICE_UNKNOWN from Watch, as the protocol says.
    """

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()

    def add_to(self, server: Any) -> None:
        """Registers with a grpc.aio server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_server(self, *, is_serving: bool) -> None:
        """Sets the whole server and its services."""
        for service in ("", *SERVICES):
            await self._servicer.set(service, _status(is_serving))

    async def set_model(self, name: str, *, is_serving: bool) -> None:
        """Sets one model."""
        await self._servicer.set(f"camserve/{name}", _status(is_serving))

    async def drain(self) -> None:
        """Everything is NOT_SERVING from now on, whatever is set later."""
        await self._servicer.enter_graceful_shutdown()


def _status(is_serving: bool) -> int:  # noqa: FBT001 - the value is the question
    statuses = health_pb2.HealthCheckResponse
    return statuses.SERVING if is_serving else statuses.NOT_SERVING  # type: ignore[no-any-return]


class MetricsPage:
    """`/metrics` over HTTP, in a thread of its own so that a scrape never waits for the event loop."""

    def __init__(self, metrics: Metrics, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), metrics.registry)
        except OSError as error:
            raise OSError(f"metrics_listen {address}: {error.strerror}") from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

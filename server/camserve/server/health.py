"""What others ask to know whether we are well: `grpc.health.v1` for probes and balancers; `pages.py` tells the same over HTTP.

`app.py` tells what loads, serves and drains, and the watchdog what hangs; here it becomes one status for each name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["SERVICES", "Health"]

SERVICES = ("camserve.v1.ExplanationService", "camserve.v1.ModelService", "inference.GRPCInferenceService")

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the library ships no types
    """The standard health service: one status for the whole server (""), each service, and `camserve/<model>`.

    Unknown names, and those of models that are gone, get NOT_FOUND from Check and SERVICE_UNKNOWN from Watch, as the protocol
    says. Changed on the event loop, read from any thread. Our own, since the library's forgets the other watchers of a name when
    one leaves.

    Args:
        check: raises a CamserveError if the current caller may not ask for a name.

    Attributes:
        stall: why the server hangs, or empty.
    """

    def __init__(self, check: Callable[[str], None] = lambda _name: None) -> None:
        self._check = check
        self._is_serving: dict[str, bool] = {}
        self._is_draining = False
        self._changed = asyncio.Event()
        self.stall = ""

    def add_to(self, server: Any) -> None:
        """Registers with a grpc.aio server."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def set_server(self, *, is_serving: bool) -> None:
        """Sets the whole server and its services."""
        self._is_serving |= dict.fromkeys(("", *SERVICES), is_serving)
        self._tell()

    async def set_model(self, name: str, *, is_serving: bool) -> None:
        """Sets one model."""
        self._is_serving[f"camserve/{name}"] = is_serving
        self._tell()

    def set_stall(self, stall: str) -> None:
        """Nothing serves while the server hangs; an empty text when it no longer does."""
        self.stall = stall
        self._tell()

    async def forget_model(self, name: str) -> None:
        """Nobody knows of a model any more; who watches it hears so."""
        self._is_serving.pop(f"camserve/{name}", None)
        self._tell()

    async def drain(self) -> None:
        """Everything is NOT_SERVING from now on, whatever is set later."""
        self._is_draining = True
        self._tell()

    def why_not_ready(self) -> str:
        """Why no requests should be sent; empty when they may."""
        return self.why_silent() or ("" if self._is_serving.get("") else "loading")

    def why_silent(self) -> str:
        """Why not even models that are ready answer; empty when they do, also while others are loaded."""
        return "draining" if self._is_draining else self.stall

    async def Check(  # noqa: N802 - the name is the contract's
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        """Tells how a name is."""
        self._check(request.service)
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service or model")
        return _Status(status=status)

    async def Watch(  # noqa: N802 - the name is the contract's
        self, request: health_pb2.HealthCheckRequest, _context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Tells how a name is, and again whenever that changes."""
        self._check(request.service)
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                told = status
                yield _Status(status=status)
            else:
                await changed.wait()

    def _status(self, name: str) -> int:
        if name not in self._is_serving:
            return _Status.SERVICE_UNKNOWN  # type: ignore[no-any-return]
        is_serving = self._is_serving[name] and not self.stall and not self._is_draining
        return _Status.SERVING if is_serving else _Status.NOT_SERVING  # type: ignore[no-any-return]

    def _tell(self) -> None:
        """Wakes everybody who watches; the next change has an event of its own."""
        self._changed.set()
        self._changed = asyncio.Event()

"""The bounded door: how many requests, and how many of their bytes, the server holds at once.

`pipeline.py` enters before anything is decoded. A full door refuses at once with a time to come back; a closed one (draining)
sends callers to another replica. Lives on the event loop; no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator

from camserve.server.errors import InvalidRequest, Overloaded, Reason, Unavailable
from camserve.server.metrics import Metrics

__all__ = ["Door", "DoorLimits"]

# A refused caller should not come back before the queue has moved, nor wait longer than a batch job would.
SHORTEST_RETRY_SECONDS = 0.05
LONGEST_RETRY_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """What may be held at once."""

    max_requests: int
    max_held_bytes: int


class Door:
    """Counts who is inside."""

    def __init__(self, limits: DoorLimits, metrics: Metrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._inside = 0
        self._held_bytes = 0
        self._is_closed = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._recent_seconds = 0.1

    @property
    def held_bytes(self) -> int:
        """Bytes of inputs inside."""
        return self._held_bytes

    @property
    def inside(self) -> int:
        """Requests inside."""
        return self._inside

    @contextlib.contextmanager
    def enter(self, request_bytes: int) -> Iterator[None]:
        """Holds a place for the length of a `with` block.

        Args:
            request_bytes: what the request keeps in memory: its payload and its decoded tensor.

        Raises:
            Unavailable: draining.
            Overloaded: full, with a time to come back.
            InvalidRequest: larger than the whole door.
        """
        self._refuse_if_full(request_bytes)
        self._inside += 1
        self._held_bytes += request_bytes
        self._empty.clear()
        entered = asyncio.get_running_loop().time()
        self._metrics.in_flight.set(self._inside)
        try:
            yield
        finally:
            self._inside -= 1
            self._held_bytes -= request_bytes
            seconds = asyncio.get_running_loop().time() - entered
            self._recent_seconds += 0.1 * (seconds - self._recent_seconds)
            self._metrics.in_flight.set(self._inside)
            if self._inside == 0:
                self._empty.set()

    def close(self) -> None:
        """Refuses everybody from now on."""
        self._is_closed = True

    async def wait_until_empty(self) -> None:
        """Returns when the last request has left."""
        await self._empty.wait()

    def _refuse_if_full(self, request_bytes: int) -> None:
        if self._is_closed:
            self._metrics.rejected.labels(Reason.DRAINING).inc()
            raise Unavailable(Reason.DRAINING, "the server is shutting down; send the request to another replica")
        limits = self._limits
        if request_bytes > limits.max_held_bytes:
            self._metrics.rejected.labels(Reason.IMAGE_TOO_LARGE).inc()
            raise InvalidRequest(
                Reason.IMAGE_TOO_LARGE,
                f"the input takes {request_bytes} bytes, more than the {limits.max_held_bytes} this server holds at all",
                metadata={"bytes": request_bytes, "limit": limits.max_held_bytes},
            )
        if self._inside >= limits.max_requests or self._held_bytes + request_bytes > limits.max_held_bytes:
            self._metrics.rejected.labels(Reason.QUEUE_FULL).inc()
            # About one request's stay frees the place of one; the average stay is what a newcomer would wait.
            retry = min(max(self._recent_seconds, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
            raise Overloaded(
                Reason.QUEUE_FULL,
                f"the server is full: {self._inside} of {limits.max_requests} requests and {self._held_bytes} of "
                f"{limits.max_held_bytes} bytes; try again in {retry:.2f} s",
                metadata={
                    "requests": self._inside,
                    "limit": limits.max_requests,
                    "heldBytes": self._held_bytes,
                    "limitBytes": limits.max_held_bytes,
                    "retrySeconds": f"{retry:.3f}",
                },
                retry_after_seconds=retry,
            )

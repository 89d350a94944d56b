"""The bounded door: how many requests, how many of their bytes, and how much work for the device the server holds at once.

`pipeline.py` enters before anything is decoded. A full door refuses at once with a time to come back, and so is refused whose
deadline cannot be met; a closed one (draining) sends callers to another replica. Lives on the event loop; no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

from camserve.server.comebacks import within_reason
from camserve.server.demand import Demand
from camserve.server.errors import InvalidRequest, Overloaded, Reason, Unavailable
from camserve.server.metrics import Metrics
from camserve.server.scheduling import Forecast

__all__ = ["Door", "DoorLimits"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """What may be held at once.

    Attributes:
        max_requests: past the door.
        max_held_bytes: of their inputs and outputs.
        max_queued_seconds: predicted device time, not yet run, of a newcomer's lane and those above it.
    """

    max_requests: int
    max_held_bytes: int
    max_queued_seconds: float


class Door:
    """Counts who is inside.

    Args:
        limits: what may be held.
        metrics: where refusals are counted.
        forecast: of the queue: what a request would find at a moment of monotonic seconds.
    """

    def __init__(self, limits: DoorLimits, metrics: Metrics, forecast: Callable[[Demand, float], Forecast]) -> None:
        self._limits = limits
        self._forecast = forecast
        self._metrics = metrics
        self._inside = 0
        self._held_bytes = 0
        self._is_closed = False
        self._knocks = 0
        self._moved_at = -math.inf
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

    @property
    def knocks(self) -> int:
        """How often somebody wanted in so far, refused ones included."""
        return self._knocks

    @contextlib.contextmanager
    def enter(self, request_bytes: int, demand: Demand) -> Iterator[None]:
        """Holds a place for the length of a `with` block.

        Args:
            request_bytes: what the request keeps in memory: its payload and its decoded tensor.
            demand: what it asks of the device.

        Raises:
            Unavailable: draining.
            Overloaded: full, or the deadline cannot be met; with a time to come back, where coming back would help.
            InvalidRequest: larger than the whole door.
        """
        entered = self._moved_at = asyncio.get_running_loop().time()
        self._knocks += 1
        self._refuse_if_full(request_bytes)
        self._refuse_if_too_late(demand)
        self._inside += 1
        self._held_bytes += request_bytes
        self._empty.clear()
        self._metrics.in_flight.set(self._inside)
        try:
            yield
        finally:
            self._inside -= 1
            self._held_bytes -= request_bytes
            self._moved_at = asyncio.get_running_loop().time()
            self._recent_seconds += 0.1 * (self._moved_at - entered - self._recent_seconds)
            self._metrics.in_flight.set(self._inside)
            if self._inside == 0:
                self._empty.set()

    def close(self) -> None:
        """Refuses everybody from now on."""
        self._is_closed = True

    async def wait_until_empty(self) -> None:
        """Returns when the last request has left."""
        await self._empty.wait()

    async def wait_until_quiet(self, quiet_seconds: float, *, most_seconds: float) -> None:
        """Returns when nobody has come or gone for a while, or at the latest after so long.

        Who was just answered comes back at once, and must be told where to go instead while there is still somebody to tell it.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + most_seconds
        # Silence is what is waited for, and it has no event.
        while (seconds := min(self._moved_at + quiet_seconds, until) - loop.time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(seconds)

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
            retry = within_reason(self._recent_seconds)
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

    def _refuse_if_too_late(self, demand: Demand) -> None:
        now = asyncio.get_running_loop().time()
        forecast = self._forecast(demand, now)
        limit = self._limits.max_queued_seconds
        if forecast.queued_seconds > limit:
            self._metrics.rejected.labels(Reason.QUEUE_FULL).inc()
            retry = within_reason(forecast.queued_seconds - limit)
            raise Overloaded(
                Reason.QUEUE_FULL,
                f"the server has {forecast.queued_seconds:.1f} s of work in lane {demand.job.lane} and those above it, more than "
                f"{limit:g} s; try again in {retry:.2f} s",
                metadata={
                    "queuedSeconds": f"{forecast.queued_seconds:.3f}",
                    "limitSeconds": limit,
                    "lane": demand.job.lane,
                    "retrySeconds": f"{retry:.3f}",
                },
                retry_after_seconds=retry,
            )
        remaining = demand.deadline - now
        if remaining <= 0:
            return  # Over on arrival: told as such, like any deadline that passed.
        metadata = {
            "remainingSeconds": f"{remaining:.3f}",
            "ownSeconds": f"{forecast.own_seconds:.3f}",
            "aheadSeconds": f"{forecast.ahead_seconds:.3f}",
        }
        if forecast.is_hopeless(remaining):
            self._metrics.rejected.labels(Reason.DEADLINE_UNREACHABLE).inc()
            raise Overloaded(
                Reason.DEADLINE_UNREACHABLE,
                f"the deadline is {remaining:.3f} s away, and the request takes about {forecast.own_seconds:.3f} s even alone; "
                "give it longer, ask for less, or let amplified methods send their best map so far",
                metadata=metadata,
            )
        lateness = forecast.lateness(remaining)
        if lateness > 0:
            self._metrics.rejected.labels(Reason.DEADLINE_UNREACHABLE).inc()
            retry = within_reason(lateness)
            raise Overloaded(
                Reason.DEADLINE_UNREACHABLE,
                f"the deadline is {remaining:.3f} s away, and about {forecast.ahead_seconds:.3f} s of work come first; try again "
                f"in {retry:.2f} s, or give it longer",
                metadata={**metadata, "retrySeconds": f"{retry:.3f}"},
                retry_after_seconds=retry,
            )

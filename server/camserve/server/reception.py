"""Messages on their way in: how many are taken in at once, and how long each may take.

`interceptors.py` has every call of one message wait here before gRPC reads it. Until then gRPC holds no more of it than a window
of 640 KiB; from then on all that arrives, up to the largest message. So the places here bound what half-sent messages hold, and
a caller who sends a byte now and then loses its place. Lives on the event loop; no locks of threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from camserve.server.comebacks import LONGEST_RETRY_SECONDS
from camserve.server.errors import DeadlineExceeded, Overloaded, Reason
from camserve.server.metrics import Metrics

__all__ = ["Reception"]

_T = TypeVar("_T")


class Reception:
    """Takes messages in.

    Args:
        places: messages read at once; of one caller three quarters of them.
        seconds: that one message may take, its wait for a place included.
        metrics: where refusals are counted.
    """

    def __init__(self, places: int, seconds: float, metrics: Metrics) -> None:
        self._places = asyncio.Semaphore(places)
        self._of_one = max(1, places * 3 // 4)
        self._seconds = seconds
        self._metrics = metrics
        self._callers: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def take_in(self, caller: str, receive: Callable[[], Awaitable[_T]]) -> _T:
        """Reads one message.

        Args:
            caller: whose; its messages take turns among themselves before they take those of others.
            receive: reads it.

        Raises:
            Overloaded: no place became free; only while others send slowly.
            DeadlineExceeded: it did not arrive whole in time.
        """
        is_reading = False
        try:
            async with asyncio.timeout(self._seconds), self._turn_of(caller), self._places:
                is_reading = True
                return await receive()
        except TimeoutError as error:
            if is_reading:
                raise DeadlineExceeded(
                    Reason.DEADLINE_EXCEEDED,
                    f"the request had not arrived {self._seconds:g} s after its call began (receive_seconds); send it faster, or "
                    "less",
                    metadata={"seconds": f"{self._seconds:g}", "setting": "receive_seconds"},
                ) from error
            self._metrics.rejected.labels(Reason.QUEUE_FULL).inc()
            raise Overloaded(
                Reason.QUEUE_FULL,
                f"too many requests are on their way in, and none of them arrived within {self._seconds:g} s; try again",
                metadata={"seconds": f"{self._seconds:g}", "retrySeconds": f"{LONGEST_RETRY_SECONDS:g}"},
                retry_after_seconds=LONGEST_RETRY_SECONDS,
            ) from error

    @contextlib.asynccontextmanager
    async def _turn_of(self, caller: str) -> AsyncIterator[None]:
        """A place among those of one caller, of whom nothing is kept when it has none."""
        turns, users = self._callers.get(caller) or (asyncio.Semaphore(self._of_one), 0)
        self._callers[caller] = turns, users + 1
        try:
            async with turns:
                yield
        finally:
            _, users = self._callers[caller]
            if users == 1:
                del self._callers[caller]
            else:
                self._callers[caller] = turns, users - 1

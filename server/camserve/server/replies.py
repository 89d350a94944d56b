"""The way back: what the device thread says to one request, and how the request says that nobody waits any more.

The pipeline makes one `Reply` for a request and reads it on the event loop; the runner writes to it from the device thread.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from typing import TypeAlias

from camserve.server.errors import CamserveError
from camserve.server.jobs import PassFacts, RawMap, Reading, SpecFailed

__all__ = ["Outcome", "Reply", "RowForwarded", "deliver"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowForwarded:
    """The model's answer for one row.

    Attributes:
        reading: what it said.
        started_at: monotonic seconds at which its pass began.
    """

    reading: Reading
    started_at: float


Outcome: TypeAlias = RowForwarded | RawMap | SpecFailed | PassFacts | CamserveError


class Reply:
    """One request's mailbox. `is_abandoned` is written by the loop and read by the device thread: a plain flag suffices.

    Its one reader waits often and its deadline never moves: one timer for all waits costs a fraction of one for each.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._outcomes: collections.deque[Outcome] = collections.deque()
        self._awaited: asyncio.Future[None] | None = None
        self._is_over = False
        self._timer = None if deadline is None else asyncio.get_running_loop().call_at(deadline, self._end)
        self.is_abandoned = False

    def put(self, outcome: Outcome) -> None:
        """Adds an outcome; event loop only."""
        self._outcomes.append(outcome)
        self._wake()

    async def next(self) -> Outcome:
        """Waits for the next outcome. A `CamserveError` means the whole row failed.

        Raises:
            TimeoutError: the deadline passed, and nothing lies here.
        """
        while not self._outcomes:
            if self._is_over:
                raise TimeoutError
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        return self._outcomes.popleft()

    def abandon(self) -> None:
        """Nobody waits any more: work not yet done need not be."""
        self.is_abandoned = True
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)


def deliver(loop: asyncio.AbstractEventLoop, letters: list[tuple[Reply, Outcome]]) -> None:
    """Hands outcomes from the device thread to the loop, in order, with one wake-up for all of them."""
    loop.call_soon_threadsafe(_put_all, letters)


def _put_all(letters: list[tuple[Reply, Outcome]]) -> None:
    for reply, outcome in letters:
        reply.put(outcome)

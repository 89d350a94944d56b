"""The way back: what the device thread says to one request, and how the request says that nobody waits any more.

The pipeline makes one `Reply` for a request and reads it on the event loop; the runner writes to it from the device thread.
"""

from __future__ import annotations

import asyncio
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
    """One request's mailbox. `is_abandoned` is written by the loop and read by the device thread: a plain flag suffices."""

    def __init__(self) -> None:
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self.is_abandoned = False

    def put(self, outcome: Outcome) -> None:
        """Adds an outcome; event loop only."""
        self._outcomes.put_nowait(outcome)

    async def next(self) -> Outcome:
        """Waits for the next outcome. A `CamserveError` means the whole row failed."""
        return await self._outcomes.get()

    def abandon(self) -> None:
        """Nobody waits any more: work not yet done need not be."""
        self.is_abandoned = True


def deliver(loop: asyncio.AbstractEventLoop, letters: list[tuple[Reply, Outcome]]) -> None:
    """Hands outcomes from the device thread to the loop, in order, with one wake-up for all of them."""
    loop.call_soon_threadsafe(_put_all, letters)


def _put_all(letters: list[tuple[Reply, Outcome]]) -> None:
    for reply, outcome in letters:
        reply.put(outcome)

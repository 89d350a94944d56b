"""The way back: what the device thread says to one request, and how the request says that nobody waits any more.

The pipeline makes one `Reply` for a request and reads it on the event loop; the runner writes to it from the device thread.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import weakref
from typing import TypeAlias

from camserve.server.errors import CamserveError
from camserve.server.jobs import PassFacts, RawMap, Reading, SpecFailed

__all__ = ["Answer", "Outcome", "Reply", "RowForwarded", "deliver"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowForwarded:
    """The model's answer for one row.

    Attributes:
        reading: what it said.
        started_at: monotonic seconds at which its pass began.
        facts: of the pass as far as it has come, for an answer that ends before it does.
    """

    reading: Reading
    started_at: float
    facts: PassFacts


Answer: TypeAlias = RowForwarded | RawMap | SpecFailed | PassFacts
Outcome: TypeAlias = Answer | CamserveError


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

    async def next(self) -> Answer:
        """Waits for the next outcome.

        Raises:
            CamserveError: the whole row failed.
            TimeoutError: the deadline passed, and nothing lies here.
        """
        while not self._outcomes:
            if self._is_over:
                raise TimeoutError
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        outcome = self._outcomes.popleft()
        if not isinstance(outcome, CamserveError):
            return outcome
        try:
            raise outcome
        finally:
            # An error that its own frames hold keeps them, and with them the request, until somebody collects garbage.
            del outcome

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


class _Post:
    """Letters from the device thread to one loop. A loop that is busy finds all that came meanwhile at one wake-up.

    A wake-up is a system call, at which the device thread lets go of the interpreter and then waits for it.
    """

    def __init__(self) -> None:
        self._letters: collections.deque[tuple[Reply, Outcome]] = collections.deque()
        self._is_called = False

    def send(self, loop: asyncio.AbstractEventLoop, letters: list[tuple[Reply, Outcome]]) -> None:
        """From the device thread: letters first, then the look at the flag, lest a letter stay behind."""
        self._letters.extend(letters)
        if not self._is_called:
            self._is_called = True
            loop.call_soon_threadsafe(self._put_all)

    def _put_all(self) -> None:
        """On the loop: the flag first, then the letters, for the same reason."""
        self._is_called = False
        while self._letters:
            reply, outcome = self._letters.popleft()
            reply.put(outcome)


_POSTS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Post] = weakref.WeakKeyDictionary()


def deliver(loop: asyncio.AbstractEventLoop, letters: list[tuple[Reply, Outcome]]) -> None:
    """Hands outcomes from the device thread to the loop, in order, with as few wake-ups as the loop is quick to answer."""
    _POSTS.setdefault(loop, _Post()).send(loop, letters)

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest

from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import OutputKind, PassFacts, Reading
from camserve.server.replies import Reply, RowForwarded, deliver


def forwarded(value: float) -> RowForwarded:
    """A row that can be told from others."""
    scores = np.array([value], np.float32)
    reading = Reading(kind=OutputKind.REGRESSION, scores=scores, probabilities=scores)
    facts = PassFacts(
        rows=1, explanations=0, device="cpu", dtype="float32", plan="forward", forward_seconds=0.0, backward_seconds=0.0
    )
    return RowForwarded(reading=reading, started_at=0.0, facts=facts)


class CountingLoop:
    """A loop's way in for other threads, with a count of how often it was taken."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.wake_ups = 0

    def call_soon_threadsafe(self, work: Callable[[], None]) -> None:
        """As the loop's own."""
        self.wake_ups += 1
        self._loop.call_soon_threadsafe(work)


async def test_outcomes_come_in_order():
    """What was put first is read first; an error is an outcome like any other, and is raised."""
    reply, row, error = Reply(), forwarded(1), ExecutionFailed(Reason.MODEL_FAILED, "no")
    reply.put(row)
    reply.put(error)

    assert row is await reply.next()
    with pytest.raises(ExecutionFailed) as caught:
        await reply.next()
    assert error is caught.value


async def test_letters_cross_from_the_device_thread_in_order():
    """Outcomes put on another thread arrive at their own replies, in order, and wake whoever waits."""
    one, other = Reply(), Reply()
    rows = [forwarded(value) for value in range(3)]
    reading = asyncio.create_task(one.next())
    loop = asyncio.get_running_loop()
    thread = threading.Thread(target=deliver, args=(loop, [(one, rows[0]), (other, rows[1]), (one, rows[2])]))
    thread.start()

    assert rows[0] is await reading
    assert rows[1] is await other.next()
    assert rows[2] is await one.next()
    thread.join()


async def test_a_busy_loop_is_woken_once():
    """Letters that come while the loop is at something else arrive together and in order: a wake-up is a system call."""
    reply, rows = Reply(), [forwarded(value) for value in range(3)]
    loop = CountingLoop(asyncio.get_running_loop())

    for row in rows:
        deliver(loop, [(reply, row)])

    assert 1 == loop.wake_ups
    assert rows == [await reply.next() for _ in rows]
    deliver(loop, [(reply, rows[0])])
    assert 2 == loop.wake_ups
    assert rows[0] is await reply.next()


async def test_waiting_ends_at_the_deadline():
    """Whoever waits at the deadline is told, and whoever asks after it; what lies there already is given out first."""
    row = forwarded(1)
    reply = Reply(asyncio.get_running_loop().time() + 0.01)
    with pytest.raises(TimeoutError):
        await reply.next()

    reply.put(row)

    assert row is await reply.next()
    with pytest.raises(TimeoutError):
        await reply.next()


async def test_a_cancelled_wait_loses_no_outcome():
    """What comes after one reader was cancelled is there for the next."""
    reply, row = Reply(), forwarded(1)
    reading = asyncio.create_task(reply.next())
    await asyncio.sleep(0)
    reading.cancel()
    reply.put(row)

    with pytest.raises(asyncio.CancelledError):
        await reading
    assert row is await reply.next()


def test_abandoning_is_seen_by_the_device():
    """Nobody waits any more once the reply is abandoned."""
    reply = Reply()
    assert not reply.is_abandoned

    reply.abandon()

    assert reply.is_abandoned

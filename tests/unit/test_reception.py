"""Messages on their way in: places, turns and time."""

from __future__ import annotations

import asyncio

import pytest

from camserve.server.errors import DeadlineExceeded, Overloaded, Reason
from camserve.server.metrics import Metrics
from camserve.server.reception import Reception


class Message:
    """One that arrives when the test says so."""

    def __init__(self) -> None:
        self.is_asked_for = asyncio.Event()
        self.arrived = asyncio.Event()

    async def receive(self) -> bytes:
        """Waits for it."""
        self.is_asked_for.set()
        await self.arrived.wait()
        return b"message"


async def test_a_message_is_handed_over():
    """As it is, and nothing is kept of its caller."""
    reception, message = Reception(4, 60, Metrics()), Message()
    message.arrived.set()

    assert b"message" == await reception.take_in("one", message.receive)
    assert {} == reception._callers


async def test_one_caller_has_three_quarters_of_the_places():
    """Its further messages wait for its own, and another caller's do not."""
    reception, messages, other = Reception(4, 60, Metrics()), [Message() for _ in range(5)], Message()
    async with asyncio.TaskGroup() as group:
        for message in messages:
            group.create_task(reception.take_in("greedy", message.receive))
        await asyncio.gather(*(message.is_asked_for.wait() for message in messages[:3]))
        group.create_task(reception.take_in("other", other.receive))
        await other.is_asked_for.wait()
        assert [True, True, True, False, False] == [message.is_asked_for.is_set() for message in messages]
        messages[0].arrived.set()
        await messages[3].is_asked_for.wait()
        assert not messages[4].is_asked_for.is_set()
        for message in (*messages, other):
            message.arrived.set()

    assert {} == reception._callers


async def test_who_sends_too_slowly_loses_the_place():
    """With a status that names the setting; the next in line is read."""
    reception, slow, next_one = Reception(1, 0.05, Metrics()), Message(), Message()
    next_one.arrived.set()
    with pytest.raises(DeadlineExceeded, match="receive_seconds"):
        await reception.take_in("slow", slow.receive)

    assert b"message" == await reception.take_in("next", next_one.receive)
    assert {} == reception._callers


async def test_who_finds_no_place_in_time_is_told_to_come_back():
    """It is not its fault, and it is counted."""
    metrics = Metrics()
    reception, waiting = Reception(1, 0.05, metrics), Message()
    async with reception._places:
        with pytest.raises(Overloaded) as caught:
            await reception.take_in("waiting", waiting.receive)

    assert (Reason.QUEUE_FULL, False) == (caught.value.reason, waiting.is_asked_for.is_set())
    assert caught.value.retry_after_seconds
    assert 1 == metrics.registry.get_sample_value("camserve_rejected_total", {"reason": "QUEUE_FULL"})


async def test_who_leaves_gives_the_place_back():
    """Whether it was being read or waited."""
    reception, first, second = Reception(1, 60, Metrics()), Message(), Message()
    reading = asyncio.create_task(reception.take_in("one", first.receive))
    await first.is_asked_for.wait()
    waiting = asyncio.create_task(reception.take_in("two", second.receive))
    await asyncio.sleep(0)
    for task in (waiting, reading):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    second.arrived.set()

    assert b"message" == await reception.take_in("two", second.receive)
    assert {} == reception._callers

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest
from support.cards import card, job

from camserve.server.jobs import Lane, Sample
from camserve.server.models.repository import ServedModel
from camserve.server.queue import PATIENCE_SECONDS, DeviceQueue, Entry
from camserve.server.replies import Reply


def served(**changes: object) -> ServedModel:
    """A model of which the queue looks at the card only."""
    return ServedModel(card=card(**changes), pass_model=None)


def sample(side: int = 32) -> Sample:
    """A decoded input of that size."""
    return Sample(tensor=np.zeros((3, side, side), np.float32), geometry=None)


def put(queue: DeviceQueue, model: ServedModel, side: int = 32, **changes: object) -> Entry:
    """Puts a request in, now."""
    now = asyncio.get_running_loop().time()
    return queue.put(job(**changes), model, sample(side), Reply(), now)


@pytest.fixture
def queue() -> DeviceQueue:
    """A window of ten minutes: a test that would wait for it times out."""
    return DeviceQueue(window_seconds=600)


async def test_a_batch_leaves_with_what_waits_for_the_same_pass(queue):
    """Rows of one shape leave together in order of arrival; another shape stays for the next batch."""
    model = served()
    first, other, second = put(queue, model), put(queue, model, side=64), put(queue, model)

    assert [first, second] == list(await queue.next_batch())
    assert 1 == len(queue)
    assert [other] == list(await queue.next_batch())
    assert 0 == len(queue)


async def test_a_batch_has_at_most_the_models_rows(queue):
    """The card's limit cuts a batch."""
    model = served(max_batch_rows=2)
    entries = [put(queue, model) for _ in range(3)]

    assert entries[:2] == list(await queue.next_batch())
    assert entries[2:] == list(await queue.next_batch())


async def test_the_earliest_deadline_goes_first(queue):
    """A request with less time overtakes."""
    model = served(max_batch_rows=1)
    patient, urgent = put(queue, model), put(queue, model, deadline=1.0)

    assert [urgent] == list(await queue.next_batch())
    assert [patient] == list(await queue.next_batch())


async def test_patience_ends(queue):
    """A request without a deadline is overtaken by those with less time than our patience, not by those with more."""
    model = served(max_batch_rows=1)
    now = asyncio.get_running_loop().time()
    patient = put(queue, model)
    later = put(queue, model, deadline=now + PATIENCE_SECONDS[Lane.STANDARD] + 60)
    sooner = put(queue, model, deadline=now + PATIENCE_SECONDS[Lane.STANDARD] / 2)

    assert [sooner, patient, later] == [entry for _ in range(3) for entry in await queue.next_batch()]


async def test_lanes_are_patience(queue):
    """The interactive overtake the everyday, these the bulk; but who has waited longest goes before everybody in the end."""
    model = served(max_batch_rows=1)
    now = asyncio.get_running_loop().time()

    def arrived(lane: Lane, seconds_ago: float) -> Entry:
        return queue.put(job(lane=lane), model, sample(), Reply(), now - seconds_ago)

    entries = {name: arrived(Lane(name), 0) for name in ("bulk", "standard", "interactive")}
    forgotten = arrived(Lane.BULK, PATIENCE_SECONDS[Lane.BULK])

    expected = [forgotten, entries["interactive"], entries["standard"], entries["bulk"]]
    assert expected == [entry for _ in range(4) for entry in await queue.next_batch()]


async def test_a_batch_waits_for_one_that_is_being_decoded(queue):
    """Known to come means known to be waited for, within the window."""
    model = served()
    with queue.announced(model):
        first = put(queue, model)
        batch = asyncio.create_task(queue.next_batch())
        await asyncio.wait({batch}, timeout=0)
        assert not batch.done()
        second = put(queue, model)

    assert [first, second] == list(await batch)


async def test_a_batch_leaves_when_the_one_it_waited_for_fails_to_decode(queue):
    """An announcement that comes to nothing ends the wait."""
    model = served()
    with contextlib.suppress(ValueError), queue.announced(model):
        entry = put(queue, model)
        batch = asyncio.create_task(queue.next_batch())
        await asyncio.wait({batch}, timeout=0)
        raise ValueError("corrupt")

    assert [entry] == list(await batch)


async def test_a_batch_leaves_at_the_end_of_the_window():
    """Whoever takes long to decode is not waited for longer than the window."""
    queue, model = DeviceQueue(window_seconds=0.01), served()
    with queue.announced(model):
        entry = put(queue, model)

        assert [entry] == list(await queue.next_batch())


async def test_whoever_left_is_not_in_a_batch(queue):
    """A dropped entry is gone, and dropping says whether it still waited."""
    model = served()
    left, stays = put(queue, model), put(queue, model)

    assert queue.drop(left)
    assert not queue.drop(left)
    assert [stays] == list(await queue.next_batch())
    assert not queue.drop(stays)


async def test_an_empty_queue_wakes_up_for_the_first_request(queue):
    """The device waits for an event, not for a clock."""
    batch = asyncio.create_task(queue.next_batch())
    await asyncio.wait({batch}, timeout=0)
    entry = put(queue, served())

    assert [entry] == list(await batch)


async def test_the_oldest_wait_is_told(queue):
    """The gauge follows the first that waits, and is zero when nobody does."""
    assert 0.0 == queue.oldest_wait(100.0)
    entry = queue.put(job(), served(), sample(), Reply(), 10.0)
    queue.put(job(), served(), sample(), Reply(), 12.0)

    assert 5.0 == queue.oldest_wait(15.0)
    queue.drop(entry)
    assert 3.0 == queue.oldest_wait(15.0)

"""The queue between event loop and device thread: what it gives to the device, and what it keeps account of."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from support.cards import card, job

from camserve.server.demand import Demand
from camserve.server.jobs import Lane, Sample
from camserve.server.models.repository import CostSample, ServedModel
from camserve.server.queue import DeviceQueue, Entry, Turn
from camserve.server.replies import Reply
from camserve.server.scheduling import BatchKey, Limits, WorkKey

WORK = WorkKey(model="tiny", version="1", method="score-cam")


def served(*costs: CostSample, **changes: object) -> ServedModel:
    """A model of which the queue looks at the card, and at what passes took at warm-up."""
    return ServedModel(card=card(**changes), pass_model=None, costs=costs)


def demand(model: ServedModel, depth: int = 1, works: Sequence[WorkKey] = (), **changes: object) -> Demand:
    """What a job for that model asks."""
    return Demand(
        job=job(**changes),
        model=model,
        key=BatchKey(model="tiny", version="1", shape=(3, 32, 32)),
        depth=depth,
        works=dict(enumerate(works)),
    )


def put(queue: DeviceQueue, model: ServedModel, side: int = 32, *, ago: float = 0.0, **changes: object) -> Entry:
    """Puts a request in, now."""
    asked = demand(model, **changes)
    sample = Sample(tensor=np.zeros((3, side, side), np.float32), geometry=None)
    return queue.put(asked, asked.job, sample, Reply(), time.monotonic() - ago)


def take(queue: DeviceQueue) -> list[Entry]:
    """What the device is to do now."""
    return list(queue.take(time.monotonic()).entries)


def _depth(turn: Turn) -> int:
    return max(entry.waiting.depth for entry in turn.entries)


def run(queue: DeviceQueue, seconds: float = 0.01) -> Turn:
    """Takes something and says that it took so long."""
    turn = queue.take(time.monotonic())
    if turn.entries and not turn.decision.is_chunk:
        queue.observe_pass(turn.entries, _depth(turn), seconds, time.monotonic())
    if turn.entries:
        queue.end(turn, seconds, time.monotonic())
    return turn


@pytest.fixture
def queue() -> DeviceQueue:
    """A window of ten minutes: a test that would wait for it fails."""
    return DeviceQueue(Limits(window_seconds=600))


async def test_a_batch_leaves_with_what_waits_for_the_same_pass(queue):
    """Rows of one shape leave together in order of arrival; another shape stays for the next batch."""
    model = served()
    first, other, second = put(queue, model), put(queue, model, side=64), put(queue, model)

    assert [first, second] == take(queue)
    assert 1 == len(queue)
    assert [other] == take(queue)
    assert 0 == len(queue)
    assert [] == take(queue)


async def test_a_batch_has_at_most_the_models_rows(queue):
    """The card's limit cuts a batch."""
    model = served(max_batch_rows=2)
    entries = [put(queue, model) for _ in range(3)]

    assert entries[:2] == take(queue)
    assert entries[2:] == take(queue)


async def test_forms_and_versions_do_not_mix(queue):
    """Rows that another form of the program runs are not of the same pass."""
    model = served()
    one = put(queue, model)
    asked = demand(model)
    asked = dataclasses.replace(asked, key=dataclasses.replace(asked.key, form="folded"))
    other = queue.put(asked, asked.job, one.sample, Reply(), time.monotonic())

    assert [[one], [other]] == [take(queue), take(queue)]


async def test_lanes_share_the_device(queue):
    """The more urgent lane is first, and each lane has its turn when others have had theirs."""
    model = served(max_batch_rows=1)
    entries = [put(queue, model, lane=lane) for lane in (Lane.BULK, Lane.STANDARD, Lane.INTERACTIVE) for _ in range(8)]
    lanes = [run(queue).entries[0].job.lane for _ in entries]

    assert [Lane.INTERACTIVE, Lane.STANDARD, Lane.BULK] == lanes[:3]
    assert [6, 3, 1] == [lanes[:10].count(lane) for lane in Lane]


async def test_what_was_charged_is_what_it_took(queue):
    """A lane whose pass took far longer than predicted waits until others have had as much."""
    model = served(max_batch_rows=1)
    for lane in (Lane.INTERACTIVE, Lane.STANDARD):
        for _ in range(20):
            put(queue, model, lane=lane)
    assert Lane.INTERACTIVE is run(queue, seconds=1.0).entries[0].job.lane

    assert {Lane.STANDARD} == {run(queue, seconds=0.01).entries[0].job.lane for _ in range(15)}


async def test_a_batch_waits_for_one_that_is_being_decoded(queue):
    """Known to come means known to be waited for, within the window, and the wait ends when it came."""
    model = served()
    with queue.announced(demand(model)):
        first = put(queue, model)
        turn = queue.take(time.monotonic())
        assert not turn.entries
        assert turn.decision.ask_again_at == first.waiting.enqueued_at + 600
        second = put(queue, model)

    assert [first, second] == take(queue)


async def test_a_batch_leaves_when_the_one_it_waited_for_fails_to_decode(queue):
    """An announcement that comes to nothing ends the wait, and is told as a change."""
    model = served()
    with contextlib.suppress(ValueError), queue.announced(demand(model)):
        entry = put(queue, model)
        assert [] == take(queue)
        queue.listen()
        raise ValueError("corrupt")

    await queue.changed(math.inf)
    assert [entry] == take(queue)


async def test_callers_that_come_back_are_waited_for():
    """Behind a pass with a large fixed part the device waits for those it answered, and no longer once they are there."""
    queue, model = DeviceQueue(Limits(window_seconds=600, max_pass_seconds=600)), served()
    for _ in range(3):
        put(queue, model)
    run(queue, seconds=30.0)
    first = put(queue, model)

    assert [] == take(queue)
    for _ in range(3):
        with queue.announced(demand(model)):
            pass
    assert [first] == take(queue)


async def test_whoever_left_is_not_in_a_batch(queue):
    """A dropped entry is gone, and dropping says whether it still waited."""
    model = served()
    left, stays = put(queue, model), put(queue, model)

    assert queue.drop(left)
    assert not queue.drop(left)
    assert [stays] == take(queue)
    assert not queue.drop(stays)


async def test_whose_time_is_over_is_not_run(queue):
    """An expired entry that its caller has not yet taken out is passed over."""
    model = served()
    put(queue, model, deadline=time.monotonic() - 0.001)
    alive = put(queue, model)

    assert [alive] == take(queue)


async def test_an_empty_queue_wakes_up_for_the_first_request(queue):
    """The device waits for an event, not for a clock; a moment to ask again ends the wait as well."""
    queue.listen()
    waiting = asyncio.create_task(queue.changed(math.inf))
    await asyncio.wait({waiting}, timeout=0)
    assert not waiting.done()
    put(queue, served())
    await waiting

    queue.listen()
    await queue.changed(time.monotonic())


async def test_amplified_work_waits_for_its_turn():
    """After its pass it goes on a chunk at a time, in turn with others and with passes, and is no decoded request."""
    queue, model = DeviceQueue(Limits(window_seconds=0)), served()
    one, other = (put(queue, model, side=side, works=[WORK]) for side in (32, 64))
    assert [[one], [other]] == [list(run(queue).entries) for _ in range(2)]
    for entry in (one, other):
        queue.put_back(entry, [WORK], 0.0, 0.0, time.monotonic())
    assert 0 == len(queue)

    order = []
    for _ in range(4):
        turn = run(queue)
        assert turn.decision.is_chunk
        order.append(turn.entries[0])
        queue.put_back(turn.entries[0], [WORK], 0.01, 0.01, time.monotonic())
    assert [one, other, one, other] == order
    cheap = put(queue, model)
    assert [cheap] == list(run(queue).entries)


async def test_amplified_work_that_nobody_waits_for_is_given_up(queue):
    """Whoever leaves between two chunks, in one, or too late: the next turn tells whose work to let go of."""
    model = served()
    waits, runs, late = (put(queue, model, works=[WORK], deadline=time.monotonic() + 3600) for _ in range(3))
    assert [waits, runs, late] == list(run(queue).entries)
    for entry in (waits, late):
        queue.put_back(entry, [WORK], 0.0, 0.0, time.monotonic())
    waits.reply.abandon()
    queue.drop(waits)
    runs.reply.abandon()
    queue.drop(runs)
    queue.put_back(runs, [WORK], 0.0, 0.0, time.monotonic())
    turn = queue.take(time.monotonic() + 7200)

    assert [] == list(turn.entries)
    assert {waits, runs, late} == set(turn.gone)
    assert [] == list(queue.take(time.monotonic()).gone)


async def test_the_oldest_wait_and_the_depth_are_told_by_lane(queue):
    """The gauges follow the first that waits, and are zero when nobody does."""
    model = served()
    assert 0.0 == queue.oldest_wait(Lane.BULK, time.monotonic)
    entry = put(queue, model, ago=5.0, lane=Lane.BULK)
    other = put(queue, model, ago=3.0, lane=Lane.BULK)
    now = entry.waiting.enqueued_at + 5.0

    assert (2, 0) == (queue.depth(Lane.BULK), queue.depth(Lane.STANDARD))
    assert 5.0 == pytest.approx(queue.oldest_wait(Lane.BULK, lambda: now))
    queue.drop(entry)
    assert now - other.waiting.enqueued_at == pytest.approx(queue.oldest_wait(Lane.BULK, lambda: now))


async def test_queued_seconds_count_what_is_past_the_door_and_has_not_run(queue):
    """From its announcement until its pass, then what is left of its amplified work; in the end nothing."""
    model = served(CostSample(depth=1, rows=1, seconds=0.5))
    with queue.announced(demand(model, works=[WORK])):
        assert 0.5 == pytest.approx(queue.queued_seconds(Lane.STANDARD), rel=0.1)
        assert 0.0 == queue.queued_seconds(Lane.BULK)
    assert 0.0 == queue.queued_seconds(Lane.STANDARD)
    entry = put(queue, model, works=[WORK])
    assert 0.5 == pytest.approx(queue.queued_seconds(Lane.STANDARD), rel=0.1)
    run(queue, seconds=0.5)
    assert 0.0 == queue.queued_seconds(Lane.STANDARD)

    queue.observe_whole(WORK, 2.0, time.monotonic())
    queue.put_back(entry, [WORK], 0.5, 0.02, time.monotonic())
    assert 1.5 == pytest.approx(queue.queued_seconds(Lane.STANDARD))
    run(queue, seconds=0.02)
    assert 0.0 == queue.queued_seconds(Lane.STANDARD)

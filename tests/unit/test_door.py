from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np
import pytest
from support.cards import card, job

from camserve.server.comebacks import LONGEST_RETRY_SECONDS, SHORTEST_RETRY_SECONDS
from camserve.server.demand import Demand
from camserve.server.door import Door, DoorLimits
from camserve.server.errors import InvalidRequest, Overloaded, Reason, Unavailable
from camserve.server.jobs import Lane, Sample
from camserve.server.metrics import Metrics
from camserve.server.models.repository import CostSample, ServedModel
from camserve.server.queue import DeviceQueue
from camserve.server.replies import Reply
from camserve.server.scheduling import BatchKey, Forecast, Limits

DEMAND = Demand(
    job=job(),
    model=ServedModel(card=card(), pass_model=None),
    key=BatchKey(model="tiny", version="1", shape=(3, 32, 32)),
)


def door_of(metrics: Metrics, forecast: Forecast = Forecast()) -> Door:  # noqa: B008 - it is frozen
    """Two requests, 100 bytes, 10 s of work, behind which a request finds what is told."""
    limits = DoorLimits(max_requests=2, max_held_bytes=100, max_queued_seconds=10)
    return Door(limits, metrics, lambda _demand, _now: forecast)


def hurried(seconds: float) -> Demand:
    """A demand whose deadline is so far away."""
    deadline = asyncio.get_running_loop().time() + seconds
    return dataclasses.replace(DEMAND, job=job(deadline=deadline, lane=Lane.INTERACTIVE))


@pytest.fixture
def metrics() -> Metrics:
    """Instruments of its own for each test."""
    return Metrics()


@pytest.fixture
def door(metrics) -> Door:
    """Two requests, 100 bytes."""
    return door_of(metrics)


def refusals(metrics: Metrics, reason: Reason) -> float:
    """How many were counted as refused for a reason."""
    return metrics.registry.get_sample_value("camserve_rejected_total", {"reason": reason}) or 0.0


async def test_places_are_counted_and_given_back(door, metrics):
    """Inside counts requests and bytes; leaving gives both back."""
    with door.enter(30, DEMAND), door.enter(40, DEMAND):
        assert (2, 70) == (door.inside, door.held_bytes)
        assert 2 == metrics.registry.get_sample_value("camserve_requests_in_flight")

    assert (0, 0) == (door.inside, door.held_bytes)
    assert 0 == metrics.registry.get_sample_value("camserve_requests_in_flight")


async def test_places_are_given_back_after_an_error(door):
    """A request that fails inside leaves nothing behind."""
    with pytest.raises(RuntimeError, match="inside"), door.enter(30, DEMAND):
        raise RuntimeError("inside")

    assert (0, 0) == (door.inside, door.held_bytes)


async def test_too_many_requests_are_told_to_come_back(door, metrics):
    """The third is refused with a time to come back, is counted, and takes no place."""
    with door.enter(1, DEMAND), door.enter(1, DEMAND):
        with pytest.raises(Overloaded) as caught, door.enter(1, DEMAND):
            pass

        assert (2, 2) == (door.inside, door.held_bytes)
    assert Reason.QUEUE_FULL == caught.value.reason
    assert SHORTEST_RETRY_SECONDS <= caught.value.retry_after_seconds <= LONGEST_RETRY_SECONDS
    assert 1 == refusals(metrics, Reason.QUEUE_FULL)


async def test_too_many_bytes_are_told_to_come_back(door):
    """Bytes are bounded as requests are, and the refusal tells every number of its text as metadata."""
    with door.enter(60, DEMAND):
        with pytest.raises(Overloaded) as caught, door.enter(41, DEMAND):
            pass
        with door.enter(40, DEMAND):
            assert 100 == door.held_bytes

    shown = {key: caught.value.metadata[key] for key in ("requests", "limit", "heldBytes", "limitBytes")}
    assert {"requests": "1", "limit": "2", "heldBytes": "60", "limitBytes": "100"} == shown


async def test_what_could_never_fit_is_not_told_to_come_back(door, metrics):
    """An input larger than the whole door is wrong in itself, also while the door is full."""
    with door.enter(1, DEMAND), door.enter(1, DEMAND), pytest.raises(InvalidRequest) as caught, door.enter(101, DEMAND):
        pass

    assert Reason.IMAGE_TOO_LARGE == caught.value.reason
    assert caught.value.retry_after_seconds is None
    assert 1 == refusals(metrics, Reason.IMAGE_TOO_LARGE)


async def test_a_closed_door_sends_callers_elsewhere(door, metrics):
    """Draining refuses newcomers and lets those inside finish."""
    with door.enter(1, DEMAND):
        door.close()
        with pytest.raises(Unavailable) as caught, door.enter(1, DEMAND):
            pass

        assert 1 == door.inside
    assert Reason.DRAINING == caught.value.reason
    assert 1 == refusals(metrics, Reason.DRAINING)


async def test_waiting_until_empty_ends_with_the_last_to_leave(door):
    """Draining waits for everybody inside, and for nobody when it is empty."""
    await door.wait_until_empty()
    first, second = door.enter(1, DEMAND), door.enter(1, DEMAND)
    first.__enter__()
    second.__enter__()
    waiting = asyncio.create_task(door.wait_until_empty())

    first.__exit__(None, None, None)
    await asyncio.wait({waiting}, timeout=0)
    assert not waiting.done()
    second.__exit__(None, None, None)
    await waiting


async def test_too_much_work_is_told_to_come_back(metrics):
    """Work beyond the limit refuses, with the time until it is below; work at the limit does not."""
    with door_of(metrics, Forecast(queued_seconds=10)).enter(1, DEMAND):
        pass
    with pytest.raises(Overloaded) as caught, door_of(metrics, Forecast(queued_seconds=13)).enter(1, DEMAND):
        pass

    assert Reason.QUEUE_FULL == caught.value.reason
    assert 3 == pytest.approx(caught.value.retry_after_seconds)
    assert ("13.000", "standard") == (caught.value.metadata["queuedSeconds"], caught.value.metadata["lane"])


async def test_a_deadline_behind_too_much_work_is_refused(metrics):
    """When what comes first takes longer than there is time, the caller is told when to come back."""
    forecast = Forecast(queued_seconds=4, own_seconds=0.5, ahead_seconds=4)
    door = door_of(metrics, forecast)
    with pytest.raises(Overloaded) as caught, door.enter(1, hurried(1)):
        pass

    assert Reason.DEADLINE_UNREACHABLE == caught.value.reason
    assert 3.73 == pytest.approx(caught.value.retry_after_seconds, abs=0.1)
    assert 1 == refusals(metrics, Reason.DEADLINE_UNREACHABLE)
    assert 0 == door.inside
    with door.enter(1, hurried(4.9)), door.enter(1, DEMAND):
        pass


async def test_what_could_never_be_in_time_is_told_so(metrics):
    """A request that alone takes longer than it may is refused without a time to come back, also by an idle server."""
    with pytest.raises(Overloaded, match="even alone") as caught:
        door_of(metrics, Forecast(own_seconds=3)).enter(1, hurried(1)).__enter__()

    assert Reason.DEADLINE_UNREACHABLE == caught.value.reason
    assert caught.value.retry_after_seconds is None


async def test_a_deadline_that_is_over_is_not_the_doors_affair(metrics):
    """It is answered as any deadline that passed."""
    with door_of(metrics, Forecast(ahead_seconds=1)).enter(1, hurried(-1)):
        pass


def busy(*costs: CostSample) -> tuple[DeviceQueue, Demand]:
    """A queue, and what a request for a model of those costs asks."""
    model = ServedModel(card=card(max_batch_rows=1), pass_model=None, costs=costs)
    return DeviceQueue(Limits()), dataclasses.replace(DEMAND, model=model)


def put(queue: DeviceQueue, demand: Demand) -> None:
    """Lets a request wait."""
    sample = Sample(tensor=np.zeros((3, 32, 32), np.float32), geometry=None)
    queue.put(demand, demand.job, sample, Reply(), time.monotonic())


async def test_a_cold_server_refuses_nobody():
    """Of a model that never ran the queue forecasts nothing, however much waits."""
    queue, demand = busy()
    for _ in range(100):
        put(queue, demand)

    assert Forecast() == queue.forecast(hurried(0.01), time.monotonic())


async def test_a_forecast_counts_what_must_come_first():
    """Work of the same lane that is due before, and of lanes above by their weight; not what is due later or lanes below."""
    queue, demand = busy(CostSample(depth=0, rows=1, seconds=1.0))
    now = time.monotonic()
    asked = dataclasses.replace(demand, job=job(deadline=now + 20), key=dataclasses.replace(demand.key, form="other"))
    for lane, deadline in (
        (Lane.BULK, 5),
        (Lane.STANDARD, 10),
        (Lane.STANDARD, 15),
        (Lane.STANDARD, 25),
        *((Lane.INTERACTIVE, 600),) * 9,
    ):
        with queue.announced(demand):
            pass
        put(queue, dataclasses.replace(demand, job=job(lane=lane, deadline=now + deadline)))
    forecast = queue.forecast(asked, now)

    assert 12 == pytest.approx(forecast.queued_seconds, rel=0.1)
    # Two of its own lane, and of the lane above no more than twice as much.
    assert 6 == pytest.approx(forecast.ahead_seconds, rel=0.1)
    assert 0 == forecast.own_seconds


async def test_a_slow_minute_is_not_believed_in_for_ever():
    """What passes take counts against a request only if it was seen often, and lately: else one is let in, and is measured."""
    queue, demand = busy()
    for _ in range(5):
        put(queue, demand)
    now = time.monotonic()
    for _ in range(5):
        turn = queue.take(now)
        queue.observe_pass(turn.entries, demand.depth, 2.0, now)
        queue.end(turn, 2.0, now)

    assert queue.forecast(demand, now + 10).is_hopeless(1.0)
    assert not queue.forecast(demand, now + 30).is_hopeless(1.0)


async def test_a_forecast_takes_microseconds():
    """Also with 256 requests waiting."""
    queue, demand = busy(CostSample(depth=0, rows=1, seconds=0.001))
    asked = dataclasses.replace(demand, job=job(deadline=time.monotonic() + 1))
    for number in range(256):
        put(queue, dataclasses.replace(demand, job=job(deadline=time.monotonic() + number)))
    times = []
    for _ in range(50):
        started = time.thread_time()
        queue.forecast(asked, time.monotonic())
        times.append(time.thread_time() - started)

    assert min(times) < 0.001


async def test_quiet_is_waited_for(door):
    """Quiet begins when the last caller has come or gone; refused ones count."""
    loop = asyncio.get_running_loop()
    with door.enter(1, DEMAND):
        pass
    door.close()

    async def knock() -> float:
        for _ in range(5):
            await asyncio.sleep(0.02)
            with pytest.raises(Unavailable), door.enter(1, DEMAND):
                pass
        return loop.time()

    knocking = asyncio.create_task(knock())
    await door.wait_until_quiet(0.5, most_seconds=60)

    assert 6 == door.knocks
    assert loop.time() - knocking.result() >= 0.5 - time.get_clock_info("monotonic").resolution


async def test_quiet_is_not_waited_for_without_end(door):
    """Whoever keeps knocking does not keep the server."""
    with door.enter(1, DEMAND):
        pass
    door.close()

    async def knock() -> None:
        while True:
            with pytest.raises(Unavailable), door.enter(1, DEMAND):
                pass
            await asyncio.sleep(0)

    knocking = asyncio.create_task(knock())
    await door.wait_until_quiet(60, most_seconds=0.05)

    assert door.knocks > 0
    assert not knocking.done()
    knocking.cancel()

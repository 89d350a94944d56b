from __future__ import annotations

import asyncio

import pytest

from camserve.server.door import LONGEST_RETRY_SECONDS, SHORTEST_RETRY_SECONDS, Door, DoorLimits
from camserve.server.errors import InvalidRequest, Overloaded, Reason, Unavailable
from camserve.server.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    """Instruments of its own for each test."""
    return Metrics()


@pytest.fixture
def door(metrics) -> Door:
    """Two requests, 100 bytes."""
    return Door(DoorLimits(max_requests=2, max_held_bytes=100), metrics)


def refusals(metrics: Metrics, reason: Reason) -> float:
    """How many were counted as refused for a reason."""
    return metrics.registry.get_sample_value("camserve_rejected_total", {"reason": reason}) or 0.0


async def test_places_are_counted_and_given_back(door, metrics):
    """Inside counts requests and bytes; leaving gives both back."""
    with door.enter(30), door.enter(40):
        assert (2, 70) == (door.inside, door.held_bytes)
        assert 2 == metrics.registry.get_sample_value("camserve_requests_in_flight")

    assert (0, 0) == (door.inside, door.held_bytes)
    assert 0 == metrics.registry.get_sample_value("camserve_requests_in_flight")


async def test_places_are_given_back_after_an_error(door):
    """A request that fails inside leaves nothing behind."""
    with pytest.raises(RuntimeError, match="inside"), door.enter(30):
        raise RuntimeError("inside")

    assert (0, 0) == (door.inside, door.held_bytes)


async def test_too_many_requests_are_told_to_come_back(door, metrics):
    """The third is refused with a time to come back, is counted, and takes no place."""
    with door.enter(1), door.enter(1):
        with pytest.raises(Overloaded) as caught, door.enter(1):
            pass

        assert (2, 2) == (door.inside, door.held_bytes)
    assert Reason.QUEUE_FULL == caught.value.reason
    assert SHORTEST_RETRY_SECONDS <= caught.value.retry_after_seconds <= LONGEST_RETRY_SECONDS
    assert 1 == refusals(metrics, Reason.QUEUE_FULL)


async def test_too_many_bytes_are_told_to_come_back(door):
    """Bytes are bounded as requests are, and the refusal tells every number of its text as metadata."""
    with door.enter(60):
        with pytest.raises(Overloaded) as caught, door.enter(41):
            pass
        with door.enter(40):
            assert 100 == door.held_bytes

    shown = {key: caught.value.metadata[key] for key in ("requests", "limit", "heldBytes", "limitBytes")}
    assert {"requests": "1", "limit": "2", "heldBytes": "60", "limitBytes": "100"} == shown


async def test_what_could_never_fit_is_not_told_to_come_back(door, metrics):
    """An input larger than the whole door is wrong in itself, also while the door is full."""
    with door.enter(1), door.enter(1), pytest.raises(InvalidRequest) as caught, door.enter(101):
        pass

    assert Reason.IMAGE_TOO_LARGE == caught.value.reason
    assert caught.value.retry_after_seconds is None
    assert 1 == refusals(metrics, Reason.IMAGE_TOO_LARGE)


async def test_a_closed_door_sends_callers_elsewhere(door, metrics):
    """Draining refuses newcomers and lets those inside finish."""
    with door.enter(1):
        door.close()
        with pytest.raises(Unavailable) as caught, door.enter(1):
            pass

        assert 1 == door.inside
    assert Reason.DRAINING == caught.value.reason
    assert 1 == refusals(metrics, Reason.DRAINING)


async def test_waiting_until_empty_ends_with_the_last_to_leave(door):
    """Draining waits for everybody inside, and for nobody when it is empty."""
    await door.wait_until_empty()
    first, second = door.enter(1), door.enter(1)
    first.__enter__()
    second.__enter__()
    waiting = asyncio.create_task(door.wait_until_empty())

    first.__exit__(None, None, None)
    await asyncio.wait({waiting}, timeout=0)
    assert not waiting.done()
    second.__exit__(None, None, None)
    await waiting

"""What the watchdog takes for a hang; looks are made by hand here, `tests/e2e/test_hanging.py` lets a real thread hang."""

from __future__ import annotations

import asyncio

import pytest

from camserve.server.heartbeat import Heartbeat
from camserve.server.metrics import Metrics
from camserve.server.watchdog import Watchdog


@pytest.fixture
def heartbeat() -> Heartbeat:
    """Of a device thread that is idle."""
    return Heartbeat()


@pytest.fixture
async def watchdog(heartbeat) -> Watchdog:
    """Patient enough not to look by itself while a test lasts."""
    told: list[str] = []
    watchdog = Watchdog(
        heartbeat,
        loop=asyncio.get_running_loop(),
        stall_seconds=3600,
        metrics=Metrics(),
        on_change=told.append,
    )
    # The thread looks only every second, and a test is over sooner; without it, none can come in between.
    watchdog.close()
    watchdog.told = told
    return watchdog


async def look(watchdog: Watchdog, seconds: float) -> None:
    """One look after so many seconds, and what the loop is told of it."""
    watchdog._look(seconds)
    await asyncio.sleep(0)


async def test_pieces_that_follow_each_other_do_not_hang(watchdog, heartbeat):
    """Each piece has its own time, however long all of them take."""
    for _ in range(3):
        with heartbeat.during("pass"):
            await look(watchdog, 3000)
            await look(watchdog, 3000)

    assert "" == watchdog.stall
    assert [] == watchdog.told


async def test_a_hang_is_told_once_and_its_end_too(watchdog, heartbeat, log_lines):
    """Beginning and end are told and logged; further looks add nothing."""
    with heartbeat.during("pass", "part", ["r-1", "r-2"]):
        for _ in range(4):
            await look(watchdog, 3000)
        assert "the device thread hangs in a pass of part" == watchdog.stall
    await look(watchdog, 1)

    assert "" == watchdog.stall
    assert ["the device thread hangs in a pass of part", ""] == watchdog.told
    stalled, goes_on = log_lines
    assert ("device stalled", "pass", "part", ["r-1", "r-2"]) == tuple(
        stalled[key] for key in ("event", "at", "model", "request_ids")
    )
    assert "test_a_hang_is_told_once_and_its_end_too" in stalled["stack"]
    assert "device goes on" == goes_on["event"]


async def test_what_may_take_long_does_not_hang(watchdog, heartbeat):
    """A model's file may be large, and its disk slow."""
    with heartbeat.during("call", is_timed=False):
        for _ in range(4):
            await look(watchdog, 3000)

    assert "" == watchdog.stall


async def test_a_loop_that_does_not_answer_hangs(watchdog, log_lines):
    """The question is asked once and stays open; the answer ends the hang."""
    for _ in range(4):
        watchdog._look(3000)
    assert "the event loop does not answer" == watchdog.stall
    await asyncio.sleep(0)
    await look(watchdog, 1)

    assert "" == watchdog.stall
    assert ["event loop stalled", "event loop goes on"] == [line["event"] for line in log_lines]


async def test_both_can_hang(watchdog, heartbeat):
    """The reason names both."""
    with heartbeat.during("call"):
        for _ in range(4):
            watchdog._look(3000)

    assert "the device thread hangs in a call and the event loop does not answer" == watchdog.stall

"""More requests than a server can answer: each still gets a status, a reason, and where it was refused a time to come back."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.load import measuring, random_input, resnet, served
from support.nets import TinyNet
from support.servers import Metrics, script_source

from camserve.client.bench import Closed, Connections, Mix, Open, Record, Window, figures_of, kind, run_step
from camserve.server.background import BackgroundServer

SIZE = 64
# One caller on a few connections stands for many: what is asked about is the door.
NOBODY_ELSE = {"caller_concurrency": 0, "max_connection_streams": 10_000}
# Ends of calls whose answer was a refusal with a time to come back, or a deadline that is told as such.
STATUSES = {
    ("OK", ""),
    ("RESOURCE_EXHAUSTED", "QUEUE_FULL"),
    ("RESOURCE_EXHAUSTED", "DEADLINE_UNREACHABLE"),
    ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
}


def statuses(records: Sequence[Record]) -> collections.Counter[tuple[str, str]]:
    """How often each occurred."""
    return collections.Counter((record.code, record.reason) for record in records)


async def test_who_finds_the_door_full_is_told_when_to_come_back(
    serve: Callable[..., BackgroundServer], tmp_path: Path
):
    """Of forty callers at a door for two, most are refused, each with a reason and a time; nobody is left inside."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), max_requests=2)
    mix = Mix(kinds=(kind("tiny", ["grad-cam"]),), inputs=(random_input(32),))
    async with Connections(server.target, count=2) as connections:
        step = await run_step(connections, mix, Closed(40, heeds_retry_after=False), Window(requests=400))

    found = statuses(step.records)
    assert {("OK", ""), ("RESOURCE_EXHAUSTED", "QUEUE_FULL")} == set(found)
    assert all(record.retry_after is not None for record in step.records if record.code != "OK")
    metrics = Metrics(server)
    assert 0 == metrics.value("camserve_requests_in_flight")
    assert found["RESOURCE_EXHAUSTED", "QUEUE_FULL"] == metrics.value("camserve_rejected_total", reason="QUEUE_FULL")


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_three_times_the_peak_leaves_nobody_without_a_status(tmp_path: Path):
    """For 20 s three times what a server can do: every request ends with a status, and afterwards it answers as before."""
    mix = Mix(kinds=(kind("net", ["grad-cam"]),), inputs=(random_input(SIZE),))
    with (
        served(resnet("resnet18", tmp_path), SIZE, tmp_path / "server.log", **NOBODY_ELSE) as server,
        measuring(),
    ):
        async with Connections(server.target, count=4) as connections:
            before = figures_of(await run_step(connections, mix, Closed(32), Window(seconds=4, warm_up_seconds=1)))
            deadline = 5 * 16 / before.requests_per_second
            hurried = Mix(kinds=(kind("net", ["grad-cam"], deadline=deadline),), inputs=mix.inputs)
            load = Open(3 * before.requests_per_second, max_in_flight=100_000)
            step = await run_step(connections, hurried, load, Window(seconds=20))
            after = figures_of(await run_step(connections, mix, Closed(32), Window(seconds=4, warm_up_seconds=1)))
        inside = server.metric("camserve_requests_in_flight")

    assert set(statuses(step.records)) <= STATUSES
    refused = [record for record in step.records if record.code == "RESOURCE_EXHAUSTED"]
    assert refused
    assert all(record.retry_after is not None for record in refused)
    assert 0 == inside
    assert 0 == after.error_share

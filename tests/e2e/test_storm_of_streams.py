"""Thousands of streams to a server in a process of its own, half of them cancelled at random stages.

Nobody hangs, nobody gets what is another's, and nothing is left in the queue, on the models or in memory.

The models repeat what they were shown, so that every message tells whose it is. Memory is compared with a bare gRPC server that
streams as many messages under the same cancellations.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

import pytest
from support.identity import MODELS, Kind, request, write_repository
from support.load import Served, served_folder, total
from support.processes import STEADY, ServerProcess, answer, connected, control_process
from support.streams import Leaving, Tally, draw, send_all

CONCURRENCY = 64
STREAMS = 20_000
SETTLED = 4_000
MOST_GROWTH_BYTES = 10 << 20
# Chunks of a thousandth of a second: amplified work takes several, and callers leave between them. One thread to decode, so that
# images wait for it and callers leave then too, however many cores there are.
SETTINGS = {"slice_seconds": 0.001, "decode_threads": 1, "log_level": "error", "torch_threads": 1}
LEFT = ("requests_in_flight", "queue_depth", "queue_bytes", "queued_device_seconds", "hooks")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A process that serves the two models."""
    folder = tmp_path_factory.mktemp("streams")
    with served_folder(write_repository(folder / "models"), folder / "log", STEADY, **SETTINGS) as server:
        yield server


async def is_empty_within(served: Served, seconds: float) -> float:
    """Waits until the server says that it holds nothing.

    Returns:
        Seconds until it said so.

    Raises:
        AssertionError: it still holds something by then; the text tells what.
    """
    since = time.monotonic()
    while True:
        samples = await asyncio.to_thread(served.metrics)
        left = {name: value for name in LEFT if (value := total(samples, f"camserve_{name}")) > 0}
        waited = time.monotonic() - since
        if not left:
            return waited
        assert waited < seconds, f"{left} are left after {waited:.1f} s"


def stages_left(served: Served) -> dict[str, float]:
    """How many callers left while the server decoded, while they were queued, and after their prediction."""
    return {stage: served.metric("camserve_cancelled_total", stage=stage) for stage in ("decode", "queue", "device")}


def assert_was_a_storm(served: Served, tally: Tally) -> None:
    """Callers left while the server decoded, while they were queued, and after their prediction."""
    assert [] == [stage for stage, count in stages_left(served).items() if count == 0]
    assert {"CANCELLED"} <= tally.of(Leaving.EARLY) & tally.of(Leaving.READS) & tally.of(Leaving.LINGERS)
    # A deadline that cannot be met by what passes take is refused at the door.
    assert tally.of(Leaving.HURRIES) <= {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert "DEADLINE_EXCEEDED" in tally.of(Leaving.HURRIES)


async def test_streams_half_of_which_leave(served):
    """Six hundred streams: no wrong message, no hang, and soon nothing is left of them.

    Where a machine's pace let nobody leave at one of the stages, another six hundred follow.
    """
    tally = Tally()
    for seed in itertools.count():
        more = await send_all(served.process.target, draw(600, seed=seed), concurrency=CONCURRENCY)
        tally = Tally(ends=tally.ends + more.ends, wrong=tally.wrong + more.wrong, hung=tally.hung + more.hung)
        await is_empty_within(served, 120)
        if seed == 4 or (all(stages_left(served).values()) and "DEADLINE_EXCEEDED" in tally.of(Leaving.HURRIES)):
            break

    assert [] == tally.hung
    assert [] == tally.wrong
    assert_was_a_storm(served, tally)


async def growth(server: ServerProcess, *, is_checked: bool) -> tuple[int, Tally]:
    """By how many bytes a server's resident set grows in the storm, once it has settled; and what became of the streams."""

    async def storm(count: int, seed: int) -> Tally:
        streams = draw(count, seed=seed)
        return await send_all(server.target, streams, concurrency=CONCURRENCY, is_checked=is_checked)

    await storm(SETTLED, seed=1)
    before = server.resident_bytes()
    tally = await storm(STREAMS, seed=2)
    return server.resident_bytes() - before, tally


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_twenty_thousand_streams(served, tmp_path):
    """None hangs, none gets what is another's; within a second nothing is queued; memory grows as that of bare gRPC."""
    async with connected(served.process) as explain:
        messages = await answer(explain, request(0, Kind.SMALL, MODELS[0]).SerializeToString())
    ours, tally = await growth(served.process, is_checked=True)
    seconds = await is_empty_within(served, 1.0)
    # As long as an answer takes the server here, so that callers leave the control at the same stages.
    with control_process(messages, tmp_path, STEADY, pause_seconds=0.01) as control:
        bare, _ = await growth(control, is_checked=False)

    ends = ", ".join(f"{leaving}: {status} {count}" for (leaving, status), count in sorted(tally.ends.items()))
    print(  # noqa: T201 - told in docs
        f"\n{STREAMS} streams: {ends}; empty after {seconds:.2f} s; "
        f"growth: camserve {ours / 2**20:.1f} MiB, bare gRPC {bare / 2**20:.1f} MiB"
    )
    assert STREAMS == sum(tally.ends.values())
    assert [] == tally.hung
    assert [] == tally.wrong
    assert_was_a_storm(served, tally)
    assert ours - bare <= MOST_GROWTH_BYTES

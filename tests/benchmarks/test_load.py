"""What a server does when more is asked of it than it can do, and what callers notice of each other. Printed by `make bench`.

Each against a `camserve serve` process, so that the generator shares nothing with it but the machine. LOAD_SECONDS is the
length of every step (10), LOAD_SIZE the side of the input in pixels (224), LOAD_ROUNDS how often compared ones take turns (3),
LOAD_MODEL a network of torchvision (resnet18), LOAD_INPUT what is sent (tensor, or jpeg for files of 640 by 480).
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.load import Served, machine_load, measuring, percentile, random_input, refused, resnet, served, unread

from camserve.client import Spec
from camserve.client.bench import (
    NOT_SENT,
    Closed,
    Connections,
    Load,
    Mix,
    Open,
    Step,
    StepFigures,
    Window,
    figures_of,
    kind,
    run_step,
)
from camserve.client.bench.sources import synthetic

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]

SECONDS = float(os.environ.get("LOAD_SECONDS", "10"))
SIZE = int(os.environ.get("LOAD_SIZE", "224"))
ROUNDS = int(os.environ.get("LOAD_ROUNDS", "3"))
MODEL = os.environ.get("LOAD_MODEL", "resnet18")
INPUTS = synthetic(640, 480, 16, seed=0).inputs if os.environ.get("LOAD_INPUT") == "jpeg" else (random_input(SIZE),)
WARM_UP = min(2.0, SECONDS / 4)
SLICE = 0.02
# A request takes about so many passes of the device at peak before it is too late.
PASSES = 5
LATEST = 0.02


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of most tests here."""
    return resnet(MODEL, tmp_path_factory.mktemp("archive"))


def asked(method: str | Spec, **options: object) -> Mix:
    """One kind of request."""
    return Mix(kinds=(kind("net", [method], **options),), inputs=INPUTS)  # type: ignore[arg-type]


async def offered(connections: Connections, mix: Mix, load: Load, seconds: float = SECONDS, *, seed: int = 0) -> Step:
    """One step with the collector at rest."""
    with measuring():
        return await run_step(connections, mix, load, Window(seconds=seconds, warm_up_seconds=WARM_UP), seed=seed)


async def row_seconds(connections: Connections) -> float:
    """The forward of one row: what no slice can be shorter than."""
    step = await offered(connections, asked("grad-cam"), Closed(1), SECONDS / 4)
    return statistics.median(record.timings.forward for record in step.due if record.timings is not None)


def told(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Prints a table."""
    print(f"\n{title} ({machine_load()})")  # noqa: T201 - the point of a benchmark
    for name, value in rows:
        print(f"  {name:<46}{value}")  # noqa: T201 - likewise


def milliseconds(seconds: float) -> str:
    """Such as `12.3 ms`."""
    return f"{seconds * 1000:.1f} ms"


def p99(step: Step) -> float:
    """Of the full answers, from when they were due."""
    latency = figures_of(step).latency
    assert latency is not None
    return latency.p99


async def test_three_times_the_peak(archive, tmp_path):
    """Offered three times what it can do, a server answers in time nine tenths of what it can, and refuses the rest at once."""
    with served(archive, SIZE, tmp_path / "server.log", caller_concurrency=0, max_connection_streams=10_000) as server:
        async with Connections(server.target, count=4) as connections:
            peak = figures_of(await offered(connections, asked("grad-cam"), Closed(32)))
            assert peak.batch_rows is not None
            deadline = PASSES * peak.batch_rows / peak.requests_per_second
            before = len(server.calls())
            load = Open(3 * peak.requests_per_second, max_in_flight=10_000)
            step = await offered(connections, asked("grad-cam", deadline=deadline), load, 6 * SECONDS)
    good = figures_of(step, target_seconds=deadline + LATEST)
    share = good.good_per_second / peak.requests_per_second
    refusals = [record.ended - record.sent for record in refused(step) if record.sent is not None]
    calls = server.calls(before)
    over = [float(str(call["seconds"])) - deadline for call in calls if call["code"] in {"OK", "DEADLINE_EXCEEDED"}]
    inside = [float(str(call["seconds"])) for call in calls if call["code"] == "RESOURCE_EXHAUSTED"]
    told(
        "three times the peak",
        [
            ("peak", f"{peak.requests_per_second:.1f}/s in passes of {peak.batch_rows:.1f} rows"),
            ("offered, each with a deadline of", f"{load.rate:.1f}/s, {milliseconds(deadline)}"),
            ("answered in time, share of the peak", f"{good.good_per_second:.1f}/s, {share:.2f}"),
            ("rows in a pass", f"{good.batch_rows or 0:.1f}"),
            ("refused", f"{len(refusals)} of {good.due}"),
            (
                "expired inside",
                str(sum(count for why, count in good.errors.items() if why.code == "DEADLINE_EXCEEDED")),
            ),
            ("refusal, sent to status, p50 and p99", _both(refusals)),
            ("refusal, inside the handler, p50 and p99", _both(inside)),
            ("answers, outside of the server's account, p99", milliseconds(percentile(unread(step), 0.99))),
            ("status after the deadline, p99 and latest", f"{_late(over, 0.99)}, {_late(over, 1)}"),
        ],
    )
    assert not [record for record in step.due if record.code == NOT_SENT or (record.code != "OK" and not record.reason)]
    assert all(record.retry_after is not None for record in refused(step))
    assert max(over) <= LATEST
    assert percentile(refusals, 0.99) <= 0.005
    assert share >= 0.9


@pytest.mark.parametrize("lane", ["standard", "bulk"])
async def test_beside_a_constant_score_cam_load(archive, tmp_path, lane):
    """Grad-CAM at half its own peak waits at most two slices longer, in the slowest of a hundred, beside Score-CAM."""
    alone, beside = [], []
    with served(archive, SIZE, tmp_path / "server.log") as server:
        async with (
            Connections(server.target, count=2) as connections,
            Connections(_other(server), timeout_seconds=None) as others,
        ):
            row = await row_seconds(connections)
            peak = figures_of(await offered(connections, asked("grad-cam"), Closed(32))).requests_per_second
            half = Open(peak / 2)
            for turn in range(ROUNDS):
                alone.append(await offered(connections, asked("grad-cam"), half, seed=turn))
                async with _Constant(others, asked("score-cam", lane=lane), callers=2):
                    beside.append(await offered(connections, asked("grad-cam"), half, seed=turn))
    piece = max(SLICE, row)
    first, second = statistics.median(map(p99, alone)), statistics.median(map(p99, beside))
    told(
        f"Grad-CAM at {half.rate:.1f}/s, half of its peak, beside two callers of Score-CAM in lane {lane}",
        [
            ("slice", milliseconds(piece)),
            ("p99 alone", milliseconds(first)),
            ("p99 beside", milliseconds(second)),
            ("longer by, in slices", f"{(second - first) / piece:.1f}"),
        ],
    )
    assert second <= first + 2 * piece


async def test_bulk_keeps_its_part(archive, tmp_path):
    """While interactive callers ask for more than there is, bulk work gets a tenth of the device."""
    name, lanes = "camserve_device_seconds_total", ("interactive", "bulk")
    with served(archive, SIZE, tmp_path / "server.log") as server:
        async with (
            Connections(server.target, count=2) as connections,
            Connections(_other(server), timeout_seconds=None) as others,
            _Constant(others, asked("score-cam", lane="bulk"), callers=2),
        ):
            before = {lane: server.metric(name, lane=lane) for lane in lanes}
            await offered(connections, asked("grad-cam", lane="interactive"), Closed(32))
            used = {lane: server.metric(name, lane=lane) - before[lane] for lane in lanes}
    share = used["bulk"] / sum(used.values())
    told("bulk under saturating interactive load", [("share of the device's time", f"{share:.3f}")])
    assert share >= 0.1


async def test_a_deadline_that_passes_is_told_at_once(archive, tmp_path):
    """Beside Score-CAM and full passes, whoever waits until its deadline is told within 20 ms of it."""
    limits = (0.03, 0.05, 0.1, 0.2, 0.3)
    kinds = tuple(kind("net", ["score-cam"], deadline=limit) for limit in limits)
    mix = Mix(kinds=kinds, inputs=INPUTS)
    with served(archive, SIZE, tmp_path / "server.log") as server:
        async with (
            Connections(server.target) as connections,
            Connections(_other(server), count=2, timeout_seconds=None) as others,
            _Constant(others, asked("score-cam"), callers=2),
            _Constant(others, asked("grad-cam"), callers=16),
        ):
            step = await offered(connections, mix, Open(20))
    late = [
        record.ended - record.sent - limits[record.kind]
        for record in step.due
        if record.code == "DEADLINE_EXCEEDED" and record.sent is not None
    ]
    turned_away = len(refused(step))
    told(
        "deadlines of 30 to 300 ms beside Score-CAM and full passes",
        [
            ("expired, refused at the door", f"{len(late)}, {turned_away} of {len(step.due)}"),
            ("told after the deadline, p50, p99, latest", f"{_late(late, 0.5)}, {_late(late, 0.99)}, {_late(late, 1)}"),
        ],
    )
    assert late
    assert percentile(late, 0.99) <= LATEST


async def test_requests_for_four_layers_share_passes(tmp_path):
    """Sixteen callers, each with one of four layers, are answered no later in all than with one layer at a time."""
    layers = ("layer1", "layer2", "layer3", "layer4")
    each = max(16, int(1.6 * SECONDS))
    mixed = Mix(kinds=tuple(kind("net", [Spec("grad-cam", layers=[layer])]) for layer in layers), inputs=INPUTS)
    apart = [asked(Spec("grad-cam", layers=[layer])) for layer in layers]
    ratios, took = [], []
    with served(resnet("resnet50", tmp_path), SIZE, tmp_path / "server.log") as server:
        async with Connections(server.target, count=4) as connections:
            for turn in range(ROUNDS + 1):
                ours = await _seconds(connections, mixed, 4 * each, turn)
                keywise = [await _seconds(connections, mix, each, turn) for mix in apart]
                took.append((ours, sum(keywise)))
                ratios.append(ours / sum(keywise))
    ratio = statistics.median(ratios[1:])
    rates = [4 * each / statistics.median(column) for column in zip(*took[1:], strict=True)]
    told(
        f"one layer of four in each request, ResNet-50, {SIZE} px, 16 callers",
        [
            ("mixed, one layer at a time", f"{rates[0]:.2f}/s, {rates[1]:.2f}/s"),
            (
                "time for as many requests, ours / key-wise",
                f"{ratio:.2f} ({min(ratios[1:]):.2f} to {max(ratios[1:]):.2f})",
            ),
        ],
    )
    assert ratio <= 1.0


async def test_a_greedy_caller_and_a_modest_one(archive, tmp_path):
    """Beside a caller that wants 32 requests under way and may have 24, one that asks singly waits a pass and a slice longer."""
    alone, beside, passes = [], [], []
    with served(archive, SIZE, tmp_path / "server.log", caller_concurrency=24) as server:
        async with Connections(server.target) as modest, Connections(_other(server), count=2) as greedy:
            row = await row_seconds(modest)
            for turn in range(ROUNDS):
                alone.append(await offered(modest, asked("grad-cam"), Closed(1), seed=turn))
                async with _Constant(greedy, asked("grad-cam"), callers=32):
                    beside.append(await offered(modest, asked("grad-cam"), Closed(1), seed=turn))
            full = figures_of(await offered(greedy, asked("grad-cam"), Closed(32), SECONDS / 2))
            passes.append((full.batch_rows or 0.0) / full.requests_per_second)
    first, second = statistics.median(map(p99, alone)), statistics.median(map(p99, beside))
    allowed = passes[0] + max(SLICE, row)
    told(
        "a modest caller beside a greedy one",
        [
            ("a full pass, a slice", f"{milliseconds(passes[0])}, {milliseconds(max(SLICE, row))}"),
            ("p99 alone, beside", f"{milliseconds(first)}, {milliseconds(second)}"),
            ("answers a second, alone and beside", f"{_rate(alone):.1f}, {_rate(beside):.1f}"),
        ],
    )
    # Its request waits for the pass that is under way, and then goes alone or with what adds no more than a slice.
    assert second <= first + allowed


class _Constant:
    """A closed loop that goes on for the length of an `async with` block."""

    def __init__(self, connections: Connections, mix: Mix, *, callers: int) -> None:
        self._arguments = (connections, mix, Closed(callers), Window(seconds=3600))
        self._stop = asyncio.Event()
        self._task: asyncio.Task[Step] | None = None

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(run_step(*self._arguments, stop=self._stop))

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        assert self._task is not None
        await self._task


async def _seconds(connections: Connections, mix: Mix, count: int, seed: int) -> float:
    """How long so many requests take sixteen callers."""
    with measuring():
        return (await run_step(connections, mix, Closed(16), Window(requests=count), seed=seed)).seconds


def _other(server: Served) -> str:
    """The same server for another caller: it tells callers apart by their host."""
    return f"[::1]:{server.port}"


def _rate(steps: Sequence[Step]) -> float:
    figures: StepFigures = figures_of(steps)
    return figures.requests_per_second


def _both(seconds: Sequence[float]) -> str:
    return f"{milliseconds(percentile(seconds, 0.5))}, {milliseconds(percentile(seconds, 0.99))}"


def _late(seconds: Sequence[float], share: float) -> str:
    return milliseconds(percentile(seconds, share))

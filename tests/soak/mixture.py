"""Sends the acts at a steady rate, probes among them, and watches the server's process meanwhile: one `Window` after another.

`__main__.py` and the suite call `soak`; `verdict.py` judges what it returns.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import psutil
from soak.acts import ACTS, PROBE, Act, Callers, Outcome
from support.load import Served, percentile

from camserve.v1 import explanation_service_pb2_grpc, model_service_pb2_grpc

__all__ = ["Course", "Plan", "Window", "soak"]

_HANGS_AFTER_SECONDS = 90.0
# More than this many at once means that the server does not keep up; acts are then left out, and counted.
_MOST_AT_ONCE = 128
_MOST_WORDS = 50


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how much.

    Attributes:
        seconds: in all.
        window_seconds: of one window.
        rate: acts a second.
        probe_share: of them that are probes.
        seed: of every choice.
    """

    seconds: float
    window_seconds: float
    rate: float
    probe_share: float = 0.25
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The server over one stretch of time.

    Attributes:
        ended_seconds: since the beginning.
        resident_bytes: median of the samples.
        descriptors: median number of open file descriptors.
        threads: median.
        probes: that were answered.
        probe_p50_seconds: from sent to the last message.
        probe_p99_seconds: likewise.
        cpu_share: of one core.
    """

    ended_seconds: float
    resident_bytes: float
    descriptors: float
    threads: float
    probes: int
    probe_p50_seconds: float
    probe_p99_seconds: float
    cpu_share: float


@dataclasses.dataclass(slots=True, kw_only=True)
class Course:
    """What happened.

    Attributes:
        windows: in order; the last may be cut short and is then left out.
        ends: acts by name and status.
        wrong: what must not have been, in words; at most fifty.
        wrong_count: of those.
        left_out: acts that were not sent because too many were under way.
        is_whole: whether it ran for as long as was planned.
    """

    windows: list[Window] = dataclasses.field(default_factory=list)
    ends: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    wrong_count: int = 0
    left_out: int = 0
    is_whole: bool = True

    def complain(self, text: str) -> None:
        """Adds to what must not have been."""
        self.wrong_count += 1
        if len(self.wrong) < _MOST_WORDS:
            self.wrong.append(text)


async def soak(
    served: Served,
    repository: Path,
    plan: Plan,
    *,
    stop: asyncio.Event,
    tell: Callable[[Window], None] = lambda _window: None,
) -> Course:
    """Loads a server until the time is over or it is told to stop; what is under way then is waited for.

    Args:
        served: in a process of its own.
        repository: whose models it serves.
        plan: how long and how much.
        stop: ends it early.
        tell: is called with each window as it ends.
    """
    course, probes = Course(), list[float]()
    began = time.monotonic()
    until = began + plan.seconds
    watching = asyncio.create_task(_watch(served, plan, course, probes, tell))
    under_way: set[asyncio.Task[None]] = set()
    stopped = asyncio.create_task(stop.wait())
    try:
        async with _connected(served) as (explain, models):
            chance = random.Random(plan.seed)  # noqa: S311 - no secret
            number, reloading = 0, asyncio.Lock()
            due = began
            while (due := due + chance.expovariate(plan.rate)) < until and not stop.is_set() and not watching.done():
                await asyncio.wait(
                    {stopped, watching}, timeout=max(0.0, due - time.monotonic()), return_when="FIRST_COMPLETED"
                )
                number += 1
                is_probe = chance.random() < plan.probe_share
                act = (
                    PROBE if is_probe else chance.choices(list(ACTS.values()), [act.weight for act in ACTS.values()])[0]
                )
                callers = Callers(
                    explain=explain,
                    models=models,
                    repository=repository,
                    reloading=reloading,
                    chance=random.Random(chance.random()),  # noqa: S311 - no secret
                    number=number,
                )
                if len(under_way) >= _MOST_AT_ONCE:
                    course.left_out += 1
                    continue
                task = asyncio.create_task(_one(act, callers, course, probes))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            course.is_whole = due >= until
            if under_way:
                await asyncio.wait(under_way, timeout=_HANGS_AFTER_SECONDS + 10)
    finally:
        for task in (watching, stopped, *under_way):
            task.cancel()
        (watched,) = await asyncio.gather(watching, return_exceptions=True)
    if isinstance(watched, Exception):
        course.is_whole = False
        course.complain(f"the server could not be watched to the end: {watched!r}")
    return course


@contextlib.asynccontextmanager
async def _connected(
    served: Served,
) -> AsyncIterator[tuple[explanation_service_pb2_grpc.ExplanationServiceStub, model_service_pb2_grpc.ModelServiceStub]]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(served.process.target, options) as channel:
        yield (
            explanation_service_pb2_grpc.ExplanationServiceStub(channel),
            model_service_pb2_grpc.ModelServiceStub(channel),
        )


async def _one(act: Act, callers: Callers, course: Course, probes: list[float]) -> None:
    """Performs one act and writes down what became of it."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(_HANGS_AFTER_SECONDS):
            outcome = await act.perform(callers)
    except TimeoutError:
        outcome = Outcome("HANGS", [f"it did not end in {_HANGS_AFTER_SECONDS:.0f} s"])
    except Exception as error:  # noqa: BLE001 - one act that cannot be performed must not end hours of others
        outcome = Outcome("FAILED", [repr(error)])
    if act is PROBE and outcome.status == "OK":
        probes.append(time.monotonic() - started)
    course.ends[act.name, outcome.status] += 1
    if outcome.wrong or outcome.status not in act.allowed:
        course.complain(f"{act.name} number {callers.number}: {outcome.status} {'; '.join(outcome.wrong)}")


async def _watch(
    served: Served, plan: Plan, course: Course, probes: list[float], tell: Callable[[Window], None]
) -> None:
    """Samples the process some times in each window; the probes that ended in a window are its own."""
    process = psutil.Process(served.pid)
    began = time.monotonic()
    pause = min(1.0, plan.window_seconds / 5)
    used = _cpu_seconds(process)
    while True:
        samples = []
        since = time.monotonic()
        while time.monotonic() < since + plan.window_seconds:
            samples.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
            await asyncio.sleep(pause)
        resident, descriptors, threads = (statistics.median(column) for column in zip(*samples, strict=True))
        taken, probes[:] = probes[:], []
        used, before = _cpu_seconds(process), used
        window = Window(
            ended_seconds=time.monotonic() - began,
            resident_bytes=resident,
            descriptors=descriptors,
            threads=threads,
            probes=len(taken),
            probe_p50_seconds=percentile(taken, 0.5),
            probe_p99_seconds=percentile(taken, 0.99),
            cpu_share=(used - before) / (time.monotonic() - since),
        )
        course.windows.append(window)
        tell(window)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

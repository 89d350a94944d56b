"""A sweep: load after load, each with the mix and, where a comparison is wanted, in turn with bare predictions.

`command.py` says what to sweep and shows what comes; `document.py` and `page.py` write it down. Rounds of the two are short and
interleaved, and their order alternates, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from camserve.client.bench.figures import StepFigures, figures_of
from camserve.client.bench.load import Connections, Progress, run_step
from camserve.client.bench.mix import Mix
from camserve.client.bench.records import Closed, Load, Step, Window
from camserve.client.credentials import ANONYMOUS, Credentials

PREDICTION: Final = "prediction"
"""The name of the step that asks for no explanation."""
# After the first round the server is warm; only the pipe has to fill again.
_LATER_WARM_UP: Final = 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        target: address of the server.
        mix: what is asked.
        baseline: the same requests without their specs, or None for no comparison.
        loads: one after the other.
        window: of each load; with a baseline each of the two gets one, in `rounds` parts.
        rounds: how many parts.
        connections: HTTP/2 connections; a closed loop never takes more than it has callers.
        timeout_seconds: gRPC's limit for each request.
        target_seconds: how fast an answer must be to be good; None for any time.
        seed: of arrivals and draws.
        credentials: who asks.
    """

    target: str
    mix: Mix
    baseline: Mix | None
    loads: tuple[Load, ...]
    window: Window
    rounds: int
    connections: int
    timeout_seconds: float
    target_seconds: float | None
    seed: int
    credentials: Credentials = ANONYMOUS

    @property
    def round_count(self) -> int:
        """How many rounds the whole sweep has."""
        return len(self.loads) * (1 if self.baseline is None else 2 * self.rounds)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """What explaining costs against predicting, from one ratio for each pair of rounds.

    Attributes:
        median: of the rounds.
        low: the smallest.
        high: the largest.
    """

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What came of one load.

    Attributes:
        mix: figures of the mix.
        prediction: figures of bare predictions under the same load; None without a comparison.
        time_ratio: of a closed loop, how much longer the server needs for a request of the mix than for a prediction: predictions
            answered in a second over requests of the mix. None where it was not measured.
        latency_ratio: median latency of the mix over that of predictions; None where it was not measured.
    """

    mix: StepFigures
    prediction: StepFigures | None = None
    time_ratio: Ratio | None = None
    latency_ratio: Ratio | None = None

    @property
    def load(self) -> Load:
        """What was offered."""
        return self.mix.load


async def sweep(
    plan: Plan,
    stop: asyncio.Event,
    begin: Callable[[Load, str, Progress], None],
) -> AsyncIterator[LoadResult]:
    """Measures load after load and yields what came of each, the last perhaps incomplete.

    Args:
        plan: what to measure.
        stop: when it is set, the round under way ends at once and is the last.
        begin: is told of each round: under which load, of "mix" or PREDICTION, and where its progress can be read.
    """
    seeds = iter(range(plan.seed, plan.seed + plan.round_count))
    for load in plan.loads:
        count = min(plan.connections, load.concurrency) if isinstance(load, Closed) else plan.connections
        steps: dict[str, list[Step]] = {"mix": [], PREDICTION: []}
        async with Connections(
            plan.target, count=count, timeout_seconds=plan.timeout_seconds, credentials=plan.credentials
        ) as connections:
            for index, names in enumerate(_rounds(plan)):
                seed = next(seeds)
                for name in names:
                    if stop.is_set():
                        break
                    progress = Progress()
                    begin(load, name, progress)
                    asked = plan.mix if name == "mix" or plan.baseline is None else plan.baseline
                    window = _part(plan, is_first=index == 0)
                    step = await run_step(connections, asked, load, window, seed=seed, progress=progress, stop=stop)
                    steps[name].append(step)
        if steps["mix"]:
            yield _result(load, steps["mix"], steps[PREDICTION], plan.target_seconds)
        if stop.is_set():
            return


def _rounds(plan: Plan) -> list[Sequence[str]]:
    """Which steps, in which order, each round has."""
    if plan.baseline is None:
        return [("mix",)]
    return [(PREDICTION, "mix") if index % 2 == 0 else ("mix", PREDICTION) for index in range(plan.rounds)]


def _part(plan: Plan, *, is_first: bool) -> Window:
    window, parts = plan.window, 1 if plan.baseline is None else plan.rounds
    return Window(
        seconds=None if window.seconds is None else window.seconds / parts,
        requests=None if window.requests is None else math.ceil(window.requests / parts),
        warm_up_seconds=window.warm_up_seconds * (1.0 if is_first else _LATER_WARM_UP),
    )


def _result(load: Load, mix: Sequence[Step], predictions: Sequence[Step], target_seconds: float | None) -> LoadResult:
    figures = figures_of(mix, target_seconds=target_seconds)
    if not predictions:
        return LoadResult(mix=figures)
    pairs = [(figures_of(one), figures_of(other)) for one, other in zip(mix, predictions, strict=False)]
    time_ratios = [
        predicted.requests_per_second / explained.requests_per_second
        for explained, predicted in pairs
        if explained.requests_per_second and predicted.requests_per_second
    ]
    latency_ratios = [
        explained.latency.p50 / predicted.latency.p50
        for explained, predicted in pairs
        if explained.latency and predicted.latency and predicted.latency.p50
    ]
    return LoadResult(
        mix=figures,
        prediction=figures_of(predictions, target_seconds=target_seconds),
        # The throughput of an open loop is that of its arrivals, whatever is asked.
        time_ratio=_ratio(time_ratios) if isinstance(load, Closed) else None,
        latency_ratio=_ratio(latency_ratios),
    )


def _ratio(values: Sequence[float]) -> Ratio | None:
    return Ratio(median=statistics.median(values), low=min(values), high=max(values)) if values else None

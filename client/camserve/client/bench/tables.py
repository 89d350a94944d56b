"""The tables of a run, as text, and the sentences beneath them: `console.py` prints them, `page.py` writes them as HTML."""

from __future__ import annotations

import dataclasses
from typing import Final

from camserve.client.bench.document import Run
from camserve.client.bench.figures import STAGES, Percentiles, StepFigures
from camserve.client.bench.sweep import LoadResult, Ratio

# Above these the generator distorts what it measures.
_BUSY_SHARE: Final = 0.8
_LATE_SHARE: Final = 0.2
# By so much a timer is late on any machine.
_TIMER_SECONDS: Final = 0.003


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table.

    Attributes:
        title: what it tells.
        headings: of its columns.
        words: how many columns from the left hold words; the others hold numbers.
        rows: their cells.
    """

    title: str
    headings: tuple[str, ...]
    words: int
    rows: tuple[tuple[str, ...], ...]


def grids(run: Run) -> list[Grid]:
    """Returns the tables that have something to tell."""
    made = [_loads(run), _stages(run), _kinds(run) if len(run.kinds) > 1 else None, _failures(run)]
    return [grid for grid in made if grid is not None and grid.rows]


def notes(run: Run) -> list[str]:
    """Returns what a reader should know before trusting the figures, and what explaining costs where that was measured."""
    told = [line for result in run.results for line in _cost(result)]
    for result in run.results:
        figures, load = result.mix, result.load
        if figures.is_growing:
            told.append(f"{load}: latencies kept rising; the server cannot keep up, and no figure is a steady one.")
        if figures.loop_share > _BUSY_SHARE:
            told.append(
                f"{load}: this load generator was busy {figures.loop_share:.0%} of the time and may be the limit."
            )
        lag, latency = figures.lag, figures.latency
        if lag and latency and lag.p99 > max(_LATE_SHARE * latency.p50, _TIMER_SECONDS):
            told.append(
                f"{load}: 1 % of the requests were sent {milliseconds(lag.p99)} ms late or later: this machine has other "
                "work. Latencies count from when a request was due."
            )
        if figures.not_sent:
            told.append(f"{load}: {figures.not_sent} requests were not sent, since too many were under way.")
        if figures.partial_maps:
            told.append(f"{load}: {figures.partial_maps} maps were unfinished at their deadline.")
    if not run.is_complete:
        told.append("Stopped before the end: the last load has fewer requests than planned.")
    return told


def ratio_text(ratio: Ratio) -> str:
    """Returns the median of the rounds and their range, such as "1.21 x (1.18 to 1.26)"."""
    return f"{ratio.median:.2f} x ({ratio.low:.2f} to {ratio.high:.2f})"


def _cost(result: LoadResult) -> list[str]:
    """What an answer of the mix costs against a prediction, by throughput where that can tell, and by latency."""
    told = []
    if result.time_ratio is not None:
        told.append(f"costs {ratio_text(result.time_ratio)} a bare prediction")
    if result.latency_ratio is not None:
        told.append(f"takes {ratio_text(result.latency_ratio)} its median latency")
    return [f"{result.load}: an answer of the mix {' and '.join(told)}."] if told else []


def labelled(run: Run) -> list[tuple[str, StepFigures]]:
    """Returns what was measured under each load, named by it: the mix, and bare predictions where they were compared."""
    rows = []
    for result in run.results:
        rows.append((str(result.load), result.mix))
        if result.prediction is not None:
            rows.append((f"{result.load}, predictions", result.prediction))
    return rows


def milliseconds(seconds: float) -> str:
    """Returns such as "12.3", and without decimals from 100."""
    number = seconds * 1000
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def mix_text(run: Run) -> str:
    """Returns what was asked, such as "grad-cam 75%, eigen-cam 25%"."""
    if len(run.kinds) == 1:
        return run.kinds[0].name
    total = sum(kind.weight for kind in run.kinds)
    return ", ".join(f"{kind.name} {kind.weight / total:.0%}" for kind in run.kinds)


def _loads(run: Run) -> Grid:
    good = "good/s" if run.target_seconds is None else f"good/s ≤ {run.target_seconds * 1000:g} ms"
    rows = []
    for name, figures in labelled(run):
        row = (
            name,
            f"{figures.requests_per_second:.1f}",
            f"{figures.explained_per_second:.1f}",
            f"{figures.good_per_second:.1f}",
            *_told(figures.latency, "p50", "p90", "p99", "max"),
            *_told(figures.first_latency, "p50", "p90", "p99", "max"),
            f"{figures.error_share:.1%}" if figures.error_share else "0",
            "" if figures.batch_rows is None else f"{figures.batch_rows:.1f}",
        )
        rows.append(row)
    whole, first = ("p50 ms", "p90", "p99", "max"), ("first p50", "p90", "p99", "max")
    headings = ("load", "answers/s", "explained/s", good, *whole, *first, "failed", "rows")
    return Grid(title="Throughput and latency", headings=headings, words=1, rows=tuple(rows))


def _stages(run: Run) -> Grid:
    rows = [
        (
            name,
            *(milliseconds(figures.stages[stage]) for stage in STAGES),
            milliseconds(sum(figures.stages.values())),
        )
        for name, figures in labelled(run)
        if figures.stages
    ]
    return Grid(title="Mean time by stage, ms", headings=("load", *STAGES, "whole"), words=1, rows=tuple(rows))


def _kinds(run: Run) -> Grid:
    rows = [
        (str(result.load), run.kinds[index].name, str(found.count), *_told(found, "p50", "p90", "p99", "max"))
        for result in run.results
        for index, found in result.mix.by_kind.items()
    ]
    headings = ("load", "kind", "answered", "p50 ms", "p90", "p99", "max")
    return Grid(title="Latency by kind of request", headings=headings, words=2, rows=tuple(rows))


def _failures(run: Run) -> Grid:
    rows = []
    for name, figures in labelled(run):
        counts = [
            *((str(why), count) for why, count in figures.errors.items()),
            *((f"spec: {why}", count) for why, count in figures.spec_errors.items()),
            *([("not sent", figures.not_sent)] if figures.not_sent else []),
        ]
        rows += [(name, what, str(count), f"{count / figures.due:.1%}") for what, count in counts]
    return Grid(title="What failed", headings=("load", "what", "count", "of those due"), words=2, rows=tuple(rows))


def _told(found: Percentiles | None, *names: str) -> list[str]:
    return ["" if found is None else milliseconds(getattr(found, name)) for name in names]

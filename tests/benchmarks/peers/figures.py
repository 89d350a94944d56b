"""From the times of answers to figures, tables and verdicts. Pure: nothing here asks, measures or prints.

`Finished` answers come from `load.py`; `__main__.py` writes what leaves.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One answer.

    Attributes:
        at: when it was complete, seconds of a steady clock.
        seconds: since it was asked for.
    """

    at: float
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One server under one load in one round.

    Attributes:
        server: its name.
        concurrency: callers.
        images_per_second: answers a second between the first lap and the end.
        latencies: of those answers, seconds.
    """

    server: str
    concurrency: int
    images_per_second: float
    latencies: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One server under one load over all rounds.

    Attributes:
        server: its name.
        concurrency: callers.
        images_per_second: median over the rounds.
        p50_seconds: median latency of all answers.
        p99_seconds: 99th percentile of them, the nearest one that occurred.
        answers: how many were counted.
    """

    server: str
    concurrency: int
    images_per_second: float
    p50_seconds: float
    p99_seconds: float
    answers: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One claim, and whether it was seen.

    Attributes:
        claim: in words, with the figure that was measured.
        holds: whether it does.
        is_binding: whether the run fails when it does not; elsewhere it is only told.
    """

    claim: str
    holds: bool
    is_binding: bool


def counted(finished: Sequence[Finished], *, concurrency: int, seconds: float) -> tuple[float, list[float]]:
    """Rate and latencies between two answers, which makes whole batches count whole.

    The window opens with the last answer of the first lap, when every caller has been answered once, and closes with the last
    answer within `seconds` of that, or the first one after if there is none.

    Returns:
        Answers a second, and the latency of each answer in the window, seconds.
    """
    ordered = sorted(finished, key=lambda answer: answer.at)
    opens = ordered[concurrency - 1].at
    later = [answer for answer in ordered[concurrency:] if answer.at > opens]
    if not later:
        raise ValueError(f"{len(ordered)} answers to {concurrency} callers: none after the first lap")
    within = [answer for answer in later if answer.at <= opens + seconds] or later[:1]
    return len(within) / (within[-1].at - opens), [answer.seconds for answer in within]


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest-rank percentile: the least value that is not below `share` of them."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def rows(measured: Iterable[Measured]) -> list[Row]:
    """One row for each server and load, in order of first appearance."""
    groups: dict[tuple[str, int], list[Measured]] = {}
    for one in measured:
        groups.setdefault((one.server, one.concurrency), []).append(one)
    found = []
    for (server, concurrency), rounds in groups.items():
        latencies = [seconds for one in rounds for seconds in one.latencies]
        found.append(
            Row(
                server=server,
                concurrency=concurrency,
                images_per_second=statistics.median(one.images_per_second for one in rounds),
                p50_seconds=percentile(latencies, 0.5),
                p99_seconds=percentile(latencies, 0.99),
                answers=len(latencies),
            )
        )
    return found


def ratio(measured: Iterable[Measured], server: str, other: str, concurrency: int) -> float | None:
    """How many times the images of `other` a server answers: the median of the rounds' own ratios; None if either is missing.

    A machine that is slow for a while is so for a whole round.
    """
    rates = {
        name: [one.images_per_second for one in measured if (one.server, one.concurrency) == (name, concurrency)]
        for name in (server, other)
    }
    pairs = list(zip(rates[server], rates[other], strict=False))
    return statistics.median(ours / theirs for ours, theirs in pairs) if pairs else None


def correlation(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Pearson's r of two maps of one shape; 1 when neither varies, 0 when only one does."""
    varies = [float(np.ptp(values)) > 0 for values in (one, other)]
    if not all(varies):
        return 1.0 if not any(varies) else 0.0
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def markdown(found: Sequence[Row], memory: Mapping[str, int], titles: Mapping[str, str], base: str) -> str:
    """The table: a row for each server and, for each load, its rate, its ratio to `base` and its latencies.

    Args:
        found: of `rows`.
        memory: peak bytes by server.
        titles: what servers are called in the table.
        base: the server that all are compared with.
    """
    loads = sorted({row.concurrency for row in found})
    by_key = {(row.server, row.concurrency): row for row in found}
    head = [
        "server",
        *(f"{load} caller{'s' if load > 1 else ''}: images/s, p50 / p99 ms" for load in loads),
        "peak MiB",
    ]
    lines = [head, ["---"] * len(head)]
    for server in dict.fromkeys(row.server for row in found):
        cells = [titles.get(server, server)]
        for load in loads:
            row, against = by_key.get((server, load)), by_key.get((base, load))
            if row is None:
                cells.append("")
                continue
            share = f" ({row.images_per_second / against.images_per_second:.2f})" if against else ""
            cells.append(
                f"{row.images_per_second:.1f}{share}, {row.p50_seconds * 1e3:.0f} / {row.p99_seconds * 1e3:.0f}"
            )
        cells.append(f"{memory[server] / 2**20:.0f}" if server in memory else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verdicts(measured: Sequence[Measured], memory: Mapping[str, int], *, has_matrix_units: bool) -> list[Verdict]:
    """Every claim whose servers were measured.

    Args:
        measured: all of it.
        memory: peak bytes by server.
        has_matrix_units: whether bfloat16 runs on AMX or on a GPU; without them its claims are told and do not bind.
    """
    claims = [
        ("camserve-float32", "litserve-tuned", 1.5, True),
        ("camserve-float32", "litserve-readme", 4.0, True),
        ("camserve-bfloat16", "litserve-tuned", 4.0, has_matrix_units),
        ("camserve-bfloat16", "litserve-readme", 10.0, has_matrix_units),
    ]
    remark = "" if has_matrix_units else " (told only: no matrix units for bfloat16 here)"
    load = max((one.concurrency for one in measured), default=0)
    found = []
    for server, other, least, is_binding in claims:
        seen = ratio(measured, server, other, load)
        if seen is not None:
            told = f"{server} answers {seen:.2f} times the images of {other} at {load} callers; at least {least:g} is wanted"
            # The claims are about a loaded server.
            holds_here = is_binding and load >= 32
            found.append(
                Verdict(claim=told + ("" if is_binding else remark), holds=seen >= least, is_binding=holds_here)
            )
    if {"camserve-float32", "litserve-tuned"} <= memory.keys():
        share = memory["camserve-float32"] / memory["litserve-tuned"]
        told = f"camserve-float32 takes {share:.2f} of the memory of litserve-tuned; at most 0.8 is wanted"
        found.append(Verdict(claim=told, holds=share <= 0.8, is_binding=True))
    return found

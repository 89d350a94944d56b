"""Judges the course of a soak: pure functions from windows to findings, and those as Markdown."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from soak.mixture import Course, Window

__all__ = ["Finding", "Limits", "judge", "markdown"]

_MIB = 1 << 20
_LINES = 12


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is still well.

    Attributes:
        growth_bytes: of resident memory after the first tenth.
        drift: of the probes' 99th percentile, as a share; infinity where the machine is not calm.
        descriptors: more than after the first tenth.
        threads: likewise.
    """

    growth_bytes: float = 20 * _MIB
    drift: float = 0.05
    descriptors: int = 2
    threads: int = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: whether it is well, and the figure with its limit in words."""

    name: str
    is_well: bool
    said: str


def judge(course: Course, left: Sequence[str], limits: Limits) -> list[Finding]:
    """What is to be said of a soak.

    Args:
        course: of it.
        left: what the server still held when nobody asked any more, in words.
        limits: what is still well.
    """
    windows = course.windows
    settled = windows[math.ceil(len(windows) / 10) :]
    quarter = max(1, len(settled) // 4)
    first, last = settled[:quarter], settled[-quarter:]
    sent = sum(course.ends.values())
    said = [
        Finding(
            name="answers",
            is_well=course.wrong_count == 0 and sent > 0,
            said=f"{sent} acts, {course.wrong_count} wrong, {course.left_out} left out",
        ),
        Finding(name="left behind", is_well=not left, said="; ".join(left) or "nothing"),
        Finding(name="length", is_well=course.is_whole, said="whole" if course.is_whole else "ended early"),
    ]
    if len(settled) < 4:
        return [*said, Finding(name="windows", is_well=False, said=f"{len(windows)} are too few to judge by")]
    # A tenth of the windows on either side, by their medians: one large request more or less is no growth.
    few = max(1, len(settled) // 10)
    before, after = _median(settled[:few], _resident), _median(settled[-few:], _resident)
    drift = _median(last, _p99) / _median(first, _p99) - 1
    descriptors = _median(last, _descriptors) - _median(first, _descriptors)
    threads = _median(last, _threads) - _median(first, _threads)
    return [
        *said,
        Finding(
            name="memory",
            is_well=after - before <= limits.growth_bytes,
            said=f"{(after - before) / _MIB:+.1f} MiB after the first tenth, from {before / _MIB:.0f} MiB; "
            f"at most {limits.growth_bytes / _MIB:.0f} MiB",
        ),
        Finding(
            name="p99",
            # Where it is not judged, a busy machine may have answered no probe in one of the quarters.
            is_well=drift <= limits.drift or (math.isinf(limits.drift) and not math.isnan(_median(settled, _p99))),
            said=f"{drift:+.1%} from {_median(first, _p99) * 1e3:.1f} ms between first and last quarter; "
            + (f"at most {limits.drift:.0%}" if math.isfinite(limits.drift) else "not judged"),
        ),
        Finding(
            name="file descriptors",
            is_well=descriptors <= limits.descriptors,
            said=f"{descriptors:+.0f}; at most {limits.descriptors:+d}",
        ),
        Finding(name="threads", is_well=threads <= limits.threads, said=f"{threads:+.0f}; at most {limits.threads:+d}"),
    ]


def markdown(course: Course, findings: Sequence[Finding], title: str) -> str:
    """A page of the findings, of what was sent, and of some windows."""
    ends: dict[str, list[str]] = {}
    for (act, status), count in sorted(course.ends.items()):
        ends.setdefault(act, []).append(f"{status} {count}")
    windows = course.windows
    shown = sorted({round(place * (len(windows) - 1) / (_LINES - 1)) for place in range(_LINES)}) if windows else []
    lines = [
        f"# {title}",
        "",
        *(f"- {'well' if finding.is_well else '**not well**'}: {finding.name}: {finding.said}" for finding in findings),
        "",
        "| Act | Ended |",
        "|---|---|",
        *(f"| {act} | {', '.join(counts)} |" for act, counts in ends.items()),
        "",
        "| After | Memory, MiB | Descriptors | Threads | Probe p50, ms | p99, ms | CPU, cores |",
        "|---|---|---|---|---|---|---|",
        *(_line(windows[place]) for place in shown),
        *(["", "What was wrong:", ""] if course.wrong else []),
        *(f"- {text}" for text in course.wrong),
    ]
    return "\n".join(lines) + "\n"


def _line(window: Window) -> str:
    return (
        f"| {window.ended_seconds:.0f} s | {window.resident_bytes / _MIB:.1f} | {window.descriptors:.0f} "
        f"| {window.threads:.0f} | {window.probe_p50_seconds * 1e3:.1f} | {window.probe_p99_seconds * 1e3:.1f} "
        f"| {window.cpu_share:.2f} |"
    )


def _median(windows: Sequence[Window], value: Callable[[Window], float]) -> float:
    """NaN where nothing was measured."""
    values = [found for found in map(value, windows) if not math.isnan(found)]
    return statistics.median(values) if values else math.nan


def _resident(window: Window) -> float:
    return window.resident_bytes


def _p99(window: Window) -> float:
    return window.probe_p99_seconds


def _descriptors(window: Window) -> float:
    return window.descriptors


def _threads(window: Window) -> float:
    return window.threads

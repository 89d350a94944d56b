"""What a step's records come to: rates, shares, percentiles, stages. Pure functions of the records.

`figures_of` takes several steps under the same load, the rounds of an interleaved comparison, as one. Throughput is taken over
what ended in the window, latencies and shares over what fell due in it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from camserve.client.bench.records import NOT_SENT, Failure, Load, Record, Step

STAGES: Final = ("lag", "decode", "queue", "forward", "backward", "maps", "encode", "other", "transport")
"""Where the time of an answer went, in order: late in the generator, the server's stages, the rest of the server's time, and the
rest of the caller's: gRPC and the network."""
# Twenty buckets for each factor of ten: a bucket is 12 % wide.
_BUCKETS_PER_DECADE: Final = 20
_SMALLEST_SECONDS: Final = 1e-4
# A queue that grows makes the later half of the answers slower; chance hardly does so by this much among so many.
_GROWTH: Final = 1.5
_ENOUGH: Final = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """A distribution in six numbers, of values that occurred (nearest rank).

    Attributes:
        count: how many values.
        mean: their mean.
        p50: the median.
        p90: not exceeded by 90 % of the values.
        p99: not exceeded by 99 % of them; the largest while there are fewer than 100.
        max: the largest.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One bar of a histogram.

    Attributes:
        above: its values are larger than this, seconds.
        up_to: and at most this.
        count: how many.
    """

    above: float
    up_to: float
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """What came of one load.

    Attributes:
        load: what was offered.
        seconds: length of the window.
        due: requests that fell due in it.
        not_sent: those that were due while as many as allowed were under way.
        answered: those answered in full.
        good: those answered in full within the target; the same as `answered` without one.
        errors: the failed ones, by why.
        spec_errors: specs that failed while their request did not, by why.
        requests_per_second: full answers that ended in the window.
        explained_per_second: those of them that carried at least one map.
        maps_per_second: maps in them.
        good_per_second: those of them within the target.
        latency: of full answers, from when they were due to their last message; None when there was none.
        first_latency: of full answers, to their first message, the prediction.
        histogram: of the same latencies.
        by_kind: the same latencies, by the index of their kind in the mix.
        batch_rows: mean over the answers of the rows that shared their pass; None when no summary told.
        batch_rows_counts: how many answers came from a pass of so many rows.
        stages: mean seconds in each of STAGES.
        partial_maps: maps that were unfinished when their deadline came.
        received_bytes_per_second: size of all messages of full answers that ended in the window.
        lag: by how much requests were sent late; None when none was sent.
        loop_share: share of the time in which the generator's own thread was busy; near 1 the generator is what was measured.
        is_growing: whether latencies kept rising: the server could not keep up with the rate, and no figure is a steady one.
        is_complete: False when it was stopped before its end.
    """

    load: Load
    seconds: float
    due: int
    not_sent: int
    answered: int
    good: int
    errors: Mapping[Failure, int]
    spec_errors: Mapping[Failure, int]
    requests_per_second: float
    explained_per_second: float
    maps_per_second: float
    good_per_second: float
    latency: Percentiles | None
    first_latency: Percentiles | None
    histogram: tuple[Bucket, ...]
    by_kind: Mapping[int, Percentiles]
    batch_rows: float | None
    batch_rows_counts: Mapping[int, int]
    stages: Mapping[str, float]
    partial_maps: int
    received_bytes_per_second: float
    lag: Percentiles | None
    loop_share: float
    is_growing: bool
    is_complete: bool

    @property
    def error_share(self) -> float:
        """Share of what fell due that was not answered in full, what was not sent included."""
        return 1 - self.answered / self.due if self.due else 0.0

    @property
    def good_share(self) -> float:
        """Share of what fell due that was answered in full within the target."""
        return self.good / self.due if self.due else 0.0


def figures_of(steps: Step | Sequence[Step], *, target_seconds: float | None = None) -> StepFigures:
    """Sums up one step, or several under the same load.

    Args:
        steps: at least one.
        target_seconds: how fast an answer must be to be good, from when it was due; None for any time.
    """
    steps = [steps] if isinstance(steps, Step) else list(steps)
    seconds = sum(step.seconds for step in steps)
    due = [record for step in steps for record in step.due]
    answers = [record for record in due if record.is_ok]
    ended = [record for step in steps for record in step.ended if record.is_ok]
    good = _within(target_seconds)
    batch_rows = [record.batch_rows for record in answers if record.batch_rows]
    latencies = [record.latency for record in answers]
    wall = sum(step.wall_seconds for step in steps)

    def rate(amount: float) -> float:
        return amount / seconds if seconds > 0 else 0.0

    return StepFigures(
        load=steps[0].load,
        seconds=seconds,
        due=len(due),
        not_sent=sum(record.code == NOT_SENT for record in due),
        answered=len(answers),
        good=sum(map(good, answers)),
        errors=_counts(Failure(record.code, record.reason) for record in due if record.code not in {"OK", NOT_SENT}),
        spec_errors=_counts(error for record in due for error in record.spec_errors),
        requests_per_second=rate(len(ended)),
        explained_per_second=rate(sum(record.maps > 0 for record in ended)),
        maps_per_second=rate(sum(record.maps for record in ended)),
        good_per_second=rate(sum(map(good, ended))),
        latency=percentiles(latencies),
        first_latency=percentiles([record.first_latency for record in answers if record.first_latency is not None]),
        histogram=histogram(latencies),
        by_kind=_by_kind(answers),
        batch_rows=statistics.fmean(batch_rows) if batch_rows else None,
        batch_rows_counts=dict(sorted(collections.Counter(batch_rows).items())),
        stages=_stages(answers),
        partial_maps=sum(record.partial_maps for record in answers),
        received_bytes_per_second=rate(sum(record.received_bytes for record in ended)),
        lag=percentiles([record.lag for record in due if record.lag is not None]),
        loop_share=sum(step.loop_seconds for step in steps) / wall if wall > 0 else 0.0,
        is_growing=any(_is_growing(step) for step in steps),
        is_complete=all(step.is_complete for step in steps),
    )


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Returns a distribution's six numbers; None when there are no values."""
    if not values:
        return None
    ordered = sorted(values)
    return Percentiles(
        count=len(ordered),
        mean=statistics.fmean(ordered),
        p50=_nearest_rank(ordered, 50),
        p90=_nearest_rank(ordered, 90),
        p99=_nearest_rank(ordered, 99),
        max=ordered[-1],
    )


def histogram(seconds: Iterable[float]) -> tuple[Bucket, ...]:
    """Returns buckets of equal width on a logarithmic axis, from the first that holds a value to the last, gaps included."""
    counts = collections.Counter(map(_bucket, seconds))
    if not counts:
        return ()
    return tuple(
        Bucket(above=_edge(index - 1) if index else 0.0, up_to=_edge(index), count=counts[index])
        for index in range(min(counts), max(counts) + 1)
    )


def _nearest_rank(ordered: Sequence[float], percent: int) -> float:
    # In integers: 0.99 * 100 is a little more than 99, and would be rounded up.
    return ordered[max(-(-percent * len(ordered) // 100) - 1, 0)]


def _bucket(seconds: float) -> int:
    """Index of the bucket, whose upper edge is `_edge` of it."""
    if seconds <= _SMALLEST_SECONDS:
        return 0
    index = math.ceil(math.log10(seconds / _SMALLEST_SECONDS) * _BUCKETS_PER_DECADE)
    # Logarithms round: the edges decide.
    while seconds > _edge(index):
        index += 1
    while index and seconds <= _edge(index - 1):
        index -= 1
    return index


def _edge(index: int) -> float:
    return float(_SMALLEST_SECONDS * 10 ** (index / _BUCKETS_PER_DECADE))


def _within(target_seconds: float | None) -> Callable[[Record], bool]:
    return lambda record: target_seconds is None or record.latency <= target_seconds


def _counts(failures: Iterable[Failure]) -> dict[Failure, int]:
    return dict(collections.Counter(failures).most_common())


def _by_kind(answers: Sequence[Record]) -> dict[int, Percentiles]:
    latencies: dict[int, list[float]] = collections.defaultdict(list)
    for record in answers:
        latencies[record.kind].append(record.latency)
    told = {kind: percentiles(values) for kind, values in sorted(latencies.items())}
    return {kind: found for kind, found in told.items() if found is not None}


def _stages(answers: Sequence[Record]) -> dict[str, float]:
    """Mean seconds in each stage; they add up to the mean latency, but for stages that ran side by side."""
    rows = []
    for record in answers:
        timings = record.timings
        if timings is None or record.sent is None:
            continue
        known = [timings.decode, timings.queue, timings.forward, timings.backward, timings.maps, timings.encode]
        other = max(timings.total - sum(known), 0.0)
        transport = max(record.ended - record.sent - timings.total, 0.0)
        rows.append((record.sent - record.intended, *known, other, transport))
    if not rows:
        return {}
    return {name: statistics.fmean(column) for name, column in zip(STAGES, zip(*rows, strict=True), strict=True)}


def _is_growing(step: Step) -> bool:
    """Whether the later half of the answers was much slower than the earlier, by when they were due."""
    latencies = [record.latency for record in sorted(step.due, key=lambda record: record.intended) if record.is_ok]
    half = len(latencies) // 2
    if half < _ENOUGH:
        return False
    return statistics.median(latencies[-half:]) > _GROWTH * statistics.median(latencies[:half])

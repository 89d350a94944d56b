from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.client.bench import NOT_SENT, Closed, Failure, Open, Record, Step, figures_of
from camserve.client.bench.figures import STAGES, histogram, percentiles
from camserve.client.results import Timings

UNUSABLE = Failure("FAILED_PRECONDITION", "LAYER_UNUSABLE")
LATENCIES = st.lists(st.floats(0, 1000), min_size=1, max_size=300)
TIMINGS = Timings(decode=0.01, queue=0.02, forward=0.03, backward=0.04, maps=0.005, encode=0.005, total=0.12)


def record(intended: float, latency: float = 0.2, **changes: object) -> Record:
    """A request that was sent a hundredth of a second late and answered with one map."""
    answered = Record(
        kind=0,
        intended=intended,
        sent=intended + 0.01,
        first=intended + latency / 2,
        ended=intended + latency,
        code="OK",
        maps=1,
        batch_rows=4,
        timings=TIMINGS,
        received_bytes=100,
    )
    return dataclasses.replace(answered, **changes)


def step(records: Sequence[Record], seconds: float = 10.0, **changes: object) -> Step:
    """A finished step."""
    made = Step(load=Open(1.0), seconds=seconds, records=records, loop_seconds=0.5, wall_seconds=10.0)
    return dataclasses.replace(made, **changes)


@given(LATENCIES)
def test_percentiles_are_numpys_nearest_ranks(values: list[float]) -> None:
    """Another implementation says the same."""
    figures = percentiles(values)

    expected = np.percentile(values, [50, 90, 99], method="inverted_cdf")
    assert figures is not None
    assert list(expected) == [figures.p50, figures.p90, figures.p99]
    assert (len(values), max(values)) == (figures.count, figures.max)
    assert math.fsum(values) / len(values) == pytest.approx(figures.mean)


@given(LATENCIES)
def test_percentiles_occurred_and_ascend(values: list[float]) -> None:
    """No value is told that was not measured, and none is below a lower percentile."""
    figures = percentiles(values)

    assert figures is not None
    told = [figures.p50, figures.p90, figures.p99, figures.max]
    assert set(told) <= set(values)
    assert told == sorted(told)


def test_percentiles_of_a_hundred() -> None:
    """The 99th percentile of 1 to 100 is 99, and not what rounding makes of 0.99 times 100."""
    figures = percentiles(range(1, 101))

    assert figures is not None
    assert (50, 90, 99, 100) == (figures.p50, figures.p90, figures.p99, figures.max)
    assert percentiles([]) is None


@given(st.lists(st.floats(0, 10_000), max_size=100))
def test_histogram_holds_every_value_once(values: list[float]) -> None:
    """Buckets join without gaps and hold exactly what lies between their edges."""
    buckets = histogram(values)

    assert len(values) == sum(bucket.count for bucket in buckets)
    for earlier, later in itertools.pairwise(buckets):
        assert earlier.up_to == later.above
    for bucket in buckets:
        inside = sum(bucket.above < value <= bucket.up_to or (value == 0 and bucket.above == 0) for value in values)
        assert inside == bucket.count


def test_what_counts_is_what_fell_due_in_the_window() -> None:
    """The warm-up does not count; an answer that came after the window counts for latency and not for throughput."""
    figures = figures_of(step([record(-0.5), record(1.0), record(9.9, latency=3.0)]))

    assert (2, 2) == (figures.due, figures.answered)
    assert figures.latency is not None
    assert 3.0 == pytest.approx(figures.latency.max)
    assert 0.1 == figures.requests_per_second


def test_throughput_counts_what_was_begun_in_the_warm_up() -> None:
    """Else a server slower than the window would seem to answer nothing."""
    figures = figures_of(step([record(-0.5, latency=1.0)]))

    assert (0, 0.1) == (figures.due, figures.requests_per_second)


def test_good_is_whole_and_within_the_target() -> None:
    """A slow answer, one that lacks a spec, a refusal and what was not sent are not good, and all of them were due."""
    records = [
        record(1.0),
        record(2.0, latency=0.6),
        record(3.0, spec_errors=(UNUSABLE,)),
        record(4.0, code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", retry_after=0.5),
        record(5.0, code="DEADLINE_EXCEEDED"),
        record(6.0, code=NOT_SENT, sent=None, first=None),
    ]

    figures = figures_of(step(records), target_seconds=0.5)

    assert (6, 1, 2, 1) == (figures.due, figures.not_sent, figures.answered, figures.good)
    assert 1 / 6 == pytest.approx(figures.good_share)
    assert 4 / 6 == pytest.approx(figures.error_share)
    assert {Failure("RESOURCE_EXHAUSTED", "QUEUE_FULL"): 1, Failure("DEADLINE_EXCEEDED", ""): 1} == figures.errors
    assert {UNUSABLE: 1} == figures.spec_errors
    assert (0.2, 0.1) == (figures.requests_per_second, figures.good_per_second)


def test_stages_add_up_to_the_latency() -> None:
    """The generator's lag, the server's stages, the rest of its time and the transport are the whole of it."""
    figures = figures_of(step([record(1.0, latency=0.2)]))

    assert list(STAGES) == list(figures.stages)
    assert 0.2 == pytest.approx(sum(figures.stages.values()))
    assert 0.01 == pytest.approx(figures.stages["lag"])
    assert 0.07 == pytest.approx(figures.stages["transport"])


def test_rounds_are_summed_up_as_one() -> None:
    """Windows add up, so that rates are over all of them."""
    rounds = [step([record(1.0), record(2.0, maps=0)]), step([record(3.0, batch_rows=2)], seconds=5.0)]

    figures = figures_of(rounds)

    assert (15.0, 3, 0.2) == (figures.seconds, figures.due, figures.requests_per_second)
    assert 2 / 15 == pytest.approx(figures.explained_per_second)
    assert {2: 1, 4: 2} == figures.batch_rows_counts
    assert 10 / 3 == figures.batch_rows
    assert 0.05 == figures.loop_share


def test_a_queue_that_grows_is_told() -> None:
    """Latencies that keep rising say that the server cannot keep up; steady ones and few ones say nothing."""
    rising = [record(index / 10, latency=0.1 + index / 10) for index in range(100)]
    steady = [record(index / 10) for index in range(100)]

    assert figures_of(step(rising)).is_growing
    assert not figures_of(step(steady)).is_growing
    assert not figures_of(step(rising[::10])).is_growing


def test_a_step_without_answers_has_no_percentiles() -> None:
    """Nothing is invented where nothing came, also when it was stopped before its window began."""
    refused = figures_of(step([record(1.0, code="UNAVAILABLE")]))
    stopped = figures_of(step([], seconds=0.0, is_complete=False))

    assert (None, None, {}, ()) == (refused.latency, refused.batch_rows, refused.stages, refused.histogram)
    assert (0.0, 0, False) == (stopped.requests_per_second, stopped.due, stopped.is_complete)


@pytest.mark.parametrize("wrong", [lambda: Closed(0), lambda: Open(0.0), lambda: Open(1.0, max_in_flight=0)])
def test_loads_that_cannot_be(wrong) -> None:
    """A load without callers, requests or room is refused where it is written."""
    with pytest.raises(ValueError, match=r"at least 1|above 0"):
        wrong()

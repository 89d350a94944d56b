"""The token bucket: no more than its rate and its burst in any stretch of time, and never a wait longer than that takes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.server.callers import CallerLimits
from camserve.server.callers.limits import Bucket

RATES = st.floats(0.01, 1000)
BURSTS = st.integers(0, 50)
PAUSES = st.lists(st.floats(0, 20), min_size=1, max_size=100)
# Monotonic clocks start anywhere.
STARTS = st.floats(0, 1e7)


def times_let_in(limits: CallerLimits, start: float, pauses: list[float]) -> list[float]:
    """When requests were let in of a caller that asks after each of these pauses, whatever it was told."""
    bucket, found = Bucket(0.0, start), []
    for now in itertools.accumulate(pauses, initial=start):
        if not bucket.wait(now, limits):
            bucket = bucket.taken(now, limits)
            found.append(now)
    return found


@given(RATES, BURSTS, STARTS, PAUSES)
def test_no_stretch_of_time_has_more_than_it_may(rate, burst, start, pauses):
    """Between any two requests that were let in there are at most a burst and what the time between them brought."""
    limits = CallerLimits(requests_per_second=rate, burst=burst)
    found = times_let_in(limits, start, pauses)

    for first, last in itertools.combinations(range(len(found)), 2):
        assert last - first + 1 <= limits.tokens + rate * (found[last] - found[first]) + 0.01


@given(RATES, BURSTS, STARTS, PAUSES)
def test_the_wait_is_exact(rate, burst, start, pauses):
    """Who comes back when told is let in; who comes back clearly before is not, and is told the rest of the same time."""
    limits = CallerLimits(requests_per_second=rate, burst=burst)
    bucket = Bucket(0.0, start)
    for now in itertools.accumulate(pauses, initial=start):
        wait = bucket.wait(now, limits)
        if wait * rate > 0.1:
            assert wait / 2 == pytest.approx(bucket.wait(now + wait / 2, limits), rel=0.01, abs=1e-4)
        assert 0 == bucket.wait(now + wait, limits)
        bucket = bucket.taken(now + wait, limits)


@given(RATES, BURSTS, STARTS)
def test_a_pause_brings_a_burst_and_no_more(rate, burst, start):
    """However long a caller was away, it has what a newcomer has."""
    limits = CallerLimits(requests_per_second=rate, burst=burst)
    at_once = [0.0] * 1200

    assert int(limits.tokens) == len(times_let_in(limits, start, at_once))
    assert int(limits.tokens) == len(times_let_in(limits, start, [0.0, 0.0, 1e6, *at_once])) - len(
        times_let_in(limits, start, [0.0, 0.0])
    )


@pytest.mark.parametrize(("rate", "burst", "tokens"), [(0.1, 0, 1), (5, 0, 5), (5, 1, 1), (5, 20, 20)])
def test_a_burst_is_a_seconds_worth_unless_told(rate, burst, tokens):
    """And at least one request, or nobody would ever be let in."""
    assert tokens == CallerLimits(requests_per_second=rate, burst=burst).tokens

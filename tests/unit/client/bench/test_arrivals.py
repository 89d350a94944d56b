from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.client.bench.arrivals import poisson

RATES = st.floats(0.01, 10_000)
SEEDS = st.integers(0, 2**32)


@given(RATES, SEEDS)
def test_arrivals_ascend_from_zero(rate: float, seed: int) -> None:
    """Nobody arrives before the start or before those who came earlier."""
    times = list(itertools.islice(poisson(rate, seed), 50))

    assert times == sorted(times)
    assert times[0] >= 0


@given(RATES, SEEDS)
def test_a_seed_gives_the_same_arrivals_at_any_rate(rate: float, seed: int) -> None:
    """The rate only stretches time, so that steps of a sweep differ in nothing else."""
    times = list(itertools.islice(poisson(rate, seed), 20))

    assert times == list(itertools.islice(poisson(rate, seed), 20))
    assert [time * rate for time in times] == pytest.approx(list(itertools.islice(poisson(1.0, seed), 20)))


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_are_poisson(seed: int) -> None:
    """Gaps have the mean and the spread of an exponential, and counts in a second vary as much as their mean."""
    rate, many = 20.0, 20_000
    times = list(itertools.islice(poisson(rate, seed), many))

    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *times])]
    assert 1 / rate == pytest.approx(statistics.fmean(gaps), rel=4 / math.sqrt(many))
    assert 1 / rate == pytest.approx(statistics.stdev(gaps), rel=0.05)
    whole_seconds = [0] * int(times[-1])
    for time in times:
        if time < len(whole_seconds):
            whole_seconds[int(time)] += 1
    assert 1.0 == pytest.approx(statistics.variance(whole_seconds) / statistics.fmean(whole_seconds), abs=0.2)


def test_two_seeds_give_different_arrivals() -> None:
    """Chance is the seed's."""
    assert next(poisson(5.0, 0)) != next(poisson(5.0, 1))

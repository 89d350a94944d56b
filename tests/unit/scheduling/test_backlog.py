"""Seconds of work inside the door: exact when all has gone, shared where passes are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.device import KEY, OTHER_KEY, FixedCosts

from camserve.server.jobs import Lane
from camserve.server.scheduling.backlog import Backlog, Load
from camserve.server.scheduling.costs import PRIOR

COSTS = FixedCosts.of(0.01, 0.001)


def load(lane: Lane = Lane.STANDARD, **changes: object) -> Load:
    """One row of a model that takes four."""
    return Load(lane=lane, **{"key": KEY, "depth": 1, "max_rows": 4, **changes})


def test_rows_share_passes() -> None:
    """Nine rows of one key are three passes; who rides with the last of them does not pay for one more."""
    backlog = Backlog()
    for _ in range(9):
        backlog.add(load())

    assert 0.039 == pytest.approx(backlog.seconds([Lane.STANDARD], COSTS))
    assert 0.029 == pytest.approx(backlog.seconds([Lane.STANDARD], COSTS, beside=KEY))
    assert 0.039 == pytest.approx(backlog.seconds([Lane.STANDARD], COSTS, beside=OTHER_KEY))
    assert 0.0 == backlog.seconds([Lane.INTERACTIVE], COSTS)


def test_the_unknown_counts_as_nothing() -> None:
    """A prior is no ground to refuse anybody."""
    backlog = Backlog()
    backlog.add(load())

    assert 0.0 == backlog.seconds([Lane.STANDARD], FixedCosts({1: PRIOR}))


loads = st.lists(
    st.builds(
        load,
        lane=st.sampled_from(Lane),
        key=st.sampled_from([KEY, OTHER_KEY, None]),
        depth=st.integers(0, 2),
        amplified_seconds=st.floats(0, 100),
    ),
    max_size=20,
)


@given(loads, st.randoms(use_true_random=False))
def test_nothing_is_left_when_all_has_gone(given_loads, chance):
    """However loads come and go, the sum of none is exactly zero and nothing is kept."""
    backlog = Backlog()
    for one in given_loads:
        backlog.add(one)
    chance.shuffle(given_loads)
    for one in given_loads:
        backlog.remove(one)

    assert 0.0 == backlog.seconds(list(Lane), COSTS)
    assert not backlog._rows

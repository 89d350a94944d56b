"""Riding together or apart, against all possible splits."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.server.scheduling.splits import cheapest_split


@given(
    st.dictionaries(st.integers(0, 9), st.integers(1, 4), min_size=1, max_size=6),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=10, max_size=10),
)
def test_no_split_is_cheaper(rows, lines):
    """The predicted total is the least of all splits into runs of depths, and every depth is in one run."""

    def seconds(depth: int, count: int) -> float:
        fixed, per_row = lines[depth]
        return fixed + per_row * count

    def total(runs: list[tuple[int, ...]]) -> float:
        return sum(seconds(run[-1], sum(rows[depth] for depth in run)) for run in runs)

    depths = sorted(rows)
    best = math.inf
    for breaks in itertools.product((False, True), repeat=len(depths) - 1):
        runs: list[tuple[int, ...]] = [(depths[0],)]
        for depth, is_break in zip(depths[1:], breaks, strict=True):
            runs = [*runs, (depth,)] if is_break else [*runs[:-1], (*runs[-1], depth)]
        best = min(best, total(runs))

    found = cheapest_split(rows, seconds)
    assert depths == [depth for run in found for depth in run]
    assert best == pytest.approx(total(found))


def test_of_equal_splits_the_fewest_passes() -> None:
    """Where it makes no difference everybody rides together."""
    assert [(0, 1, 5)] == cheapest_split({5: 1, 0: 2, 1: 1}, lambda _depth, count: 0.0 * count)

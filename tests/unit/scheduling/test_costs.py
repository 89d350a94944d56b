"""The cost model: what it learns from few passes, what it guesses, and what does not ruin it."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.device import KEY, OTHER_KEY

from camserve.server.scheduling.costs import PRIOR, CostModel
from camserve.server.scheduling.work import BatchKey, WorkKey

LARGER = dataclasses.replace(KEY, shape=(3, 64, 64))
WORK = WorkKey(model="a", version="1", method="score-cam", layers=("body",))


def learnt(*passes: tuple[int, float], depth: int = 1) -> CostModel:
    """A model that has seen passes of so many rows and seconds."""
    costs = CostModel()
    for rows, seconds in passes:
        costs.observe(KEY, depth, rows, seconds, now=0.0)
    return costs


@given(
    st.floats(0, 0.1),
    st.floats(1e-5, 0.05),
    st.lists(st.integers(1, 16), min_size=2, max_size=30).filter(lambda rows: max(rows) >= 2 * min(rows)),
)
def test_a_line_is_found(fixed, per_row, rows):
    """Passes that lie on a line are predicted by it, at every number of rows between those seen."""
    line = learnt(*[(n, fixed + per_row * n) for n in rows * 3]).line(KEY, 1)

    assert line.is_known
    for n in range(min(rows), max(rows) + 1):
        assert fixed + per_row * n == pytest.approx(line.seconds(n), rel=0.25)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 100)), min_size=1, max_size=40))
def test_no_part_is_ever_negative(passes):
    """Whatever is seen, both parts of the line are numbers and at least 0."""
    line = learnt(*passes).line(KEY, 1)

    assert line.fixed >= 0
    assert line.per_row >= 0
    assert 0 < line.seconds(1) < 1e4


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_one_number_of_rows_alone_is_predicted_and_the_rest_guessed_sensibly(rows):
    """With nothing but passes of one size, others cost neither nothing nor as much for each row as a whole pass."""
    line = learnt(*[(rows, 0.08)] * 10).line(KEY, 1)

    assert 0.08 == pytest.approx(line.seconds(rows), rel=0.01)
    assert 0.08 / 20 < line.seconds(1) <= 0.081
    assert line.seconds(rows) < line.seconds(2 * rows) <= 0.161


@pytest.mark.parametrize("outlier", [100.0, 0.0])
def test_one_outlier_does_not_ruin_it(outlier):
    """A pass that took a thousand times as long, or no time, moves predictions by little; later ones mend it."""
    usual = [(n, 0.01 + 0.002 * n) for n in (1, 4, 8, 16, 2, 8)] * 3
    costs = learnt(*usual)
    before = costs.line(KEY, 1)
    costs.observe(KEY, 1, 8, outlier, now=0.0)
    shaken = costs.line(KEY, 1)
    for rows, seconds in usual:
        costs.observe(KEY, 1, rows, seconds, now=0.0)
    mended = costs.line(KEY, 1)

    for rows in (1, 8, 16):
        assert before.seconds(rows) == pytest.approx(shaken.seconds(rows), rel=0.3)
        assert before.seconds(rows) == pytest.approx(mended.seconds(rows), rel=0.1)


@pytest.mark.parametrize("factor", [10.0, 0.1, 1.5])
def test_a_device_that_changed_is_followed(factor):
    """When passes take longer or shorter from now on, predictions follow within ten of them."""
    usual = [(n, 0.01 + 0.002 * n) for n in (1, 4, 8, 16, 2, 8)] * 3
    costs = learnt(*usual)
    for rows, seconds in usual[:10]:
        costs.observe(KEY, 1, rows, seconds * factor, now=0.0)

    for rows in (1, 8, 16):
        assert (0.01 + 0.002 * rows) * factor == pytest.approx(costs.line(KEY, 1).seconds(rows), rel=0.35)


def test_noise_averages_out() -> None:
    """Passes that scatter by a quarter are predicted within a tenth or so."""
    chance = random.Random(0)  # noqa: S311 - noise is no secret
    costs = learnt(*[(n, (0.01 + 0.002 * n) * chance.uniform(0.75, 1.25)) for n in [1, 2, 4, 8, 16] * 12])

    for rows in (1, 8, 16):
        assert 0.01 + 0.002 * rows == pytest.approx(costs.line(KEY, 1).seconds(rows), rel=0.2)


def test_nothing_known_is_a_prior() -> None:
    """Of a model never seen nothing is known, and that is said."""
    costs = learnt((1, 0.02))

    assert PRIOR == costs.line(OTHER_KEY, 1)
    assert not costs.line(OTHER_KEY, 1).is_known


def test_neighbours_stand_in() -> None:
    """Another depth of the same rows, another size of the same model: known from afar, longer where there is more to do."""
    costs = learnt(*[(n, 0.01 + 0.002 * n) for n in (1, 8, 16)] * 3)
    known = costs.line(KEY, 1).seconds(8)

    assert costs.line(KEY, 0).seconds(8) < known < costs.line(KEY, 3).seconds(8) < 4 * known
    assert 4 == pytest.approx(costs.line(LARGER, 1).per_row / costs.line(KEY, 1).per_row)
    assert costs.line(KEY, 1).fixed == pytest.approx(costs.line(LARGER, 1).fixed)
    assert known == costs.line(dataclasses.replace(KEY, form="other"), 1).seconds(8)


def test_trust_needs_several_passes_and_does_not_last() -> None:
    """Nobody is refused on the word of one pass, nor of old ones."""
    costs = learnt((1, 0.02))
    assert not costs.is_trusted(KEY, 1, now=0.0)
    for _ in range(4):
        costs.observe(KEY, 1, 1, 0.02, now=10.0)

    assert costs.is_trusted(KEY, 1, now=20.0)
    assert not costs.is_trusted(KEY, 2, now=20.0)
    assert not costs.is_trusted(KEY, 1, now=60.0)


def test_amplified_work_is_remembered_by_what_it_does() -> None:
    """Chunks and wholes of one kind of work say nothing of another."""
    costs = CostModel()
    other = dataclasses.replace(WORK, budget=("samples", 20))
    assert costs.whole_seconds(WORK) is None
    assert 0.02 == costs.chunk_seconds(WORK)
    for _ in range(5):
        costs.observe_chunk(WORK, 0.03)
        costs.observe_whole(WORK, 1.5, now=0.0)

    assert (0.03, 1.5) == (costs.chunk_seconds(WORK), costs.whole_seconds(WORK))
    assert costs.is_whole_trusted(WORK, now=1.0)
    assert not costs.is_whole_trusted(WORK, now=100.0)
    assert costs.whole_seconds(other) is None
    costs.observe_whole(WORK, 1000.0, now=0.0)
    assert 3.0 > (costs.whole_seconds(WORK) or 0)


def test_what_callers_make_up_does_not_fill_memory() -> None:
    """Of endless shapes and budgets only the latest are kept."""
    costs = CostModel()
    for side in range(1, 1500):
        costs.observe(BatchKey(model="a", version="1", shape=(3, side, side)), 1, 1, 0.01, now=0.0)
        work = dataclasses.replace(WORK, budget=side)
        costs.observe_chunk(work, 0.01)
        costs.observe_whole(work, 0.01, now=0.0)

    sizes = [len(found) for found in (costs._fits, costs._chunks, costs._wholes, *costs._places.values())]
    assert 1024 >= max(sizes)
    assert costs.line(KEY, 1).is_known


def test_rows_that_fill_the_batch_up_are_no_rows() -> None:
    """A program of one batch size costs the same for every number of rows."""
    costs = learnt(*[(n, 0.05) for n in itertools.islice(itertools.cycle((1, 8, 3)), 30)])

    for rows in (1, 3, 8):
        assert 0.05 == pytest.approx(costs.line(KEY, 1).seconds(rows), rel=0.1)


def test_what_is_gone_is_forgotten():
    """Of one load its own lines; of a version of which no load is left everything, and of others nothing."""
    costs = CostModel()
    work = WorkKey(model="a", version="1", method="score-cam")
    keys = [
        BatchKey(model="a", version=version, shape=(3, 8, 8), load_number=number)
        for version, number in (("1", 1), ("1", 2), ("2", 3))
    ]
    for key in keys:
        costs.observe(key, 1, 1, 0.5, now=0.0)
    costs.observe_whole(work, 2.0, now=0.0)
    costs.observe_chunk(work, 0.1)

    assert not costs.forget("a", "1", 1)
    assert 2.0 == costs.whole_seconds(work)
    assert costs.forget("a", "1", 2)
    assert costs.whole_seconds(work) is None
    assert not costs.line(keys[0], 1).is_known
    assert costs.line(keys[2], 1).is_known
    assert costs.forget("a", "9", 1)

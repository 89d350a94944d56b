"""Claims about the figures of the comparison with other servers."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.peers.figures import (
    Finished,
    Measured,
    correlation,
    counted,
    markdown,
    percentile,
    ratio,
    rows,
    verdicts,
)
from hypothesis import given
from hypothesis import strategies as st


def answers(*times: float, seconds: float = 1.0) -> list[Finished]:
    """One answer at each time."""
    return [Finished(at=at, seconds=seconds) for at in times]


def measured(server: str, rate: float, concurrency: int = 32, latencies: tuple[float, ...] = (0.1,)) -> Measured:
    """One round of one server."""
    return Measured(server=server, concurrency=concurrency, images_per_second=rate, latencies=latencies)


def test_first_lap_does_not_count() -> None:
    """The window opens when as many answers have come as there are callers."""
    rate, latencies = counted(answers(5, 5, 6, 7, 8), concurrency=2, seconds=10)

    assert 1 == rate
    assert 3 == len(latencies)


@given(batch=st.integers(1, 8), batches=st.integers(3, 20), pause=st.floats(0.01, 3), cut=st.floats(0, 1))
def test_rate_of_batches_does_not_depend_on_where_the_window_ends(
    batch: int, batches: int, pause: float, cut: float
) -> None:
    """Answers that come in whole batches give the batches' rate, wherever between two of them the time is up."""
    times = [index * pause for index in range(batches) for _ in range(batch)]

    rate, _ = counted(answers(*times), concurrency=batch, seconds=(1 + cut) * pause)

    assert batch / pause == pytest.approx(rate)


def test_answers_after_the_end_do_not_count() -> None:
    """What was under way when the time was up is waited for, but not counted."""
    rate, latencies = counted(answers(0, 1, 2, 9), concurrency=1, seconds=2)

    assert 1 == rate
    assert 2 == len(latencies)


def test_slow_server_is_counted_by_its_next_answers() -> None:
    """A server that answers nothing within the time is measured by its first answer after."""
    rate, latencies = counted(answers(0, 4, 8), concurrency=1, seconds=1)

    assert 0.25 == rate
    assert 1 == len(latencies)


def test_too_few_answers_are_refused() -> None:
    """Without an answer after the first lap there is no rate."""
    with pytest.raises(ValueError, match="none after the first lap"):
        counted(answers(1, 1), concurrency=2, seconds=1)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 2), (0.51, 3), (0.99, 4), (1.0, 4)])
def test_percentile_is_one_that_occurred(share: float, expected: float) -> None:
    """Nearest rank: no value is made up between two."""
    assert expected == percentile([4, 1, 3, 2], share)


def test_rows_join_rounds() -> None:
    """A row has the median rate of the rounds and the latencies of all of them."""
    (row,) = rows(
        [measured("a", 1, latencies=(1, 2)), measured("a", 5, latencies=(3,)), measured("a", 2, latencies=(4,))]
    )

    assert 2 == row.images_per_second
    assert 2 == row.p50_seconds
    assert 4 == row.p99_seconds
    assert 4 == row.answers


def test_ratio_compares_inside_rounds() -> None:
    """A machine that slows down for a round slows both servers, and their ratio stays."""
    found = [
        measured("a", 20),
        measured("b", 10),
        measured("a", 2),
        measured("b", 1),
        measured("a", 8),
        measured("b", 2),
    ]

    assert 2 == ratio(found, "a", "b", 32)


def test_ratio_needs_both_servers() -> None:
    """A server that was not measured has no ratio."""
    assert ratio([measured("a", 1)], "a", "b", 32) is None


def test_correlation_of_flat_maps() -> None:
    """Two flat maps agree; a flat one and another do not."""
    flat, slope = np.ones((2, 2), np.float32), np.arange(4, dtype=np.float32).reshape(2, 2)

    assert 1 == correlation(flat, 2 * flat)
    assert 0 == correlation(flat, slope)
    assert 1 == pytest.approx(correlation(slope, 3 * slope + 1))


def test_table_has_a_row_for_each_server() -> None:
    """Rates, ratios to the base, latencies in milliseconds and memory stand in one row; what was not measured stays empty."""
    found = rows([measured("a", 20, 8), measured("a", 30, 32), measured("b", 10, 32, (0.2, 0.4))])

    lines = markdown(found, {"a": 3 << 20}, {"b": "the other"}, "b").splitlines()

    assert "| server | 8 callers: images/s, p50 / p99 ms | 32 callers: images/s, p50 / p99 ms | peak MiB |" == lines[0]
    assert "| a | 20.0, 100 / 100 | 30.0 (3.00), 100 / 100 | 3 |" == lines[2]
    assert "| the other |  | 10.0 (1.00), 200 / 400 |  |" == lines[3]


def everything(rate: float, concurrency: int = 32) -> list[Measured]:
    """Both precisions of camserve at one rate, beside peers that answer one image a second."""
    rates = {"camserve-float32": rate, "camserve-bfloat16": rate, "litserve-tuned": 1, "litserve-readme": 1}
    return [measured(server, images, concurrency) for server, images in rates.items()]


@pytest.mark.parametrize("has_matrix_units", [True, False])
def test_half_precision_binds_only_with_matrix_units(*, has_matrix_units: bool) -> None:
    """Without AMX or a GPU the claims about bfloat16 are told and cannot fail the run."""
    found = verdicts(everything(1), {}, has_matrix_units=has_matrix_units)

    assert 4 == len(found)
    assert not any(verdict.holds for verdict in found)
    assert {"float32": True, "bfloat16": has_matrix_units} == {
        verdict.claim.split()[0].removeprefix("camserve-"): verdict.is_binding for verdict in found
    }


def test_claims_bind_only_under_load() -> None:
    """The quick form with 8 callers tells and cannot fail."""
    assert not any(verdict.is_binding for verdict in verdicts(everything(1, 8), {}, has_matrix_units=True))


def test_claims_hold_at_their_limits() -> None:
    """What is wanted at least is enough."""
    assert all(verdict.holds for verdict in verdicts(everything(10), {}, has_matrix_units=True))


@pytest.mark.parametrize(("ours", "holds"), [(80, True), (81, False)])
def test_memory_is_compared_with_the_tuned_peer(*, ours: int, holds: bool) -> None:
    """At most 0.8 of what the tuned peer takes."""
    (verdict,) = verdicts([], {"camserve-float32": ours, "litserve-tuned": 100}, has_matrix_units=False)

    assert holds is verdict.holds
    assert verdict.is_binding

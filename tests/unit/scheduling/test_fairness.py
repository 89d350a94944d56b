"""Fair shares over time, on a device with a simulated clock: lanes, amplified work beside passes, callers; nobody starves."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device import KEY, OTHER_KEY, FixedCosts, Request, Simulation

from camserve.server.jobs import Lane
from camserve.server.scheduling.planner import WEIGHTS, Limits
from camserve.server.scheduling.work import BatchKey

SLICE = 0.02
LIMITS = Limits(window_seconds=0.002, max_pass_seconds=SLICE)
LANES = list(Lane)


def flood(lane: Lane, count: int = 12, **changes: object) -> list[Request]:
    """A lane that always has so many waiting, in a shape of its own: each is asked again as soon as it is answered."""
    key = BatchKey(model=lane.value, version="1", shape=(3, 32, 32))
    return [Request(lane=lane, repeats=10**6, **{"key": key, **changes}) for _ in range(count)]


def drift(simulation: Simulation, lanes: set[Lane], until: float) -> float:
    """How far any two lanes came apart at any time, in seconds over weight."""
    had = dict.fromkeys(lanes, 0.0)
    widest = 0.0
    for ran in simulation.ran:
        if ran.ended_at > until:
            break
        for entry in ran.candidates:
            had[entry.lane] += (ran.ended_at - ran.started_at) / len(ran.candidates) / WEIGHTS[entry.lane]
        widest = max(widest, max(had.values()) - min(had.values()))
    return widest


@settings(max_examples=15, deadline=None)
@given(
    st.sets(st.sampled_from(LANES), min_size=2),
    st.sampled_from([0.002, 0.004, 0.01]),
    st.sampled_from([0.0, 0.002, 0.02]),
    st.integers(0, 9),
)
def test_lanes_that_wait_get_their_weights(lanes, per_row, fixed, seed):
    """At no time does a lane that waits come further from its weight than one slice of each, even where costs are misjudged."""
    seconds, chance = 1.0, random.Random(seed)  # noqa: S311 - a workload is no secret
    simulation = Simulation(
        FixedCosts.of(fixed, per_row),
        LIMITS,
        truth=lambda _candidates, predicted: predicted * chance.uniform(0.5, 2),
    )
    simulation.run([request for lane in sorted(lanes) for request in flood(lane)], until=seconds)

    slice_ = 2 * max(SLICE, fixed + per_row)
    allowed = slice_ / min(WEIGHTS[lane] for lane in lanes) + slice_ / max(WEIGHTS[lane] for lane in lanes)
    assert allowed >= drift(simulation, lanes, seconds)


@settings(max_examples=8, deadline=None)
@given(st.sets(st.sampled_from([Lane.INTERACTIVE, Lane.STANDARD]), min_size=1), st.integers(1, 16), st.booleans())
def test_bulk_keeps_a_tenth(above, max_rows, is_amplified):
    """Beside floods of passes in the lanes above, bulk has its tenth of the device, be it of passes or of amplified work."""
    seconds = 1.5
    simulation = Simulation(FixedCosts.of(0.001, 0.002), LIMITS)
    requests = [request for lane in above for request in flood(lane, max_rows=max_rows)]
    bulk = {"chunks": 400, "is_only_chunks": True} if is_amplified else {}
    simulation.run([*requests, *flood(Lane.BULK, **bulk)], until=seconds)

    assert 0.1 * seconds - 2 * SLICE <= simulation.seconds_by("lane", seconds)[Lane.BULK]


def test_riders_do_not_take_a_third_lanes_share() -> None:
    """Bulk rides with sparse interactive rows; standard, which cannot ride, still gets its weight against bulk."""
    seconds = 2.0
    simulation = Simulation(FixedCosts.of(0.0005, 0.002), LIMITS)
    interactive = [
        Request(announced_at=place * 0.004, lane=Lane.INTERACTIVE, max_rows=16) for place in range(int(seconds / 0.004))
    ]
    bulk = flood(Lane.BULK, 32, max_rows=16, key=KEY)
    standard = flood(Lane.STANDARD, key=OTHER_KEY)
    simulation.run([*interactive, *bulk, *standard], until=seconds)

    had = simulation.seconds_by("lane", seconds)
    assert had[Lane.STANDARD] >= 3 * (had[Lane.BULK] - 4 * SLICE)


def test_free_rows_are_used_when_nobody_else_waits() -> None:
    """Bulk rides with interactive rows as far as there is room, and both are done in the fewest passes."""
    simulation = Simulation(FixedCosts.of(0.005, 0.0005), LIMITS)
    requests = [Request(lane=Lane.INTERACTIVE, max_rows=16) for _ in range(4)]
    requests += [Request(lane=Lane.BULK, max_rows=16) for _ in range(28)]

    assert [16, 16] == [len(ran.requests) for ran in simulation.run(requests)]


def test_a_lane_that_comes_back_is_served_next() -> None:
    """An interactive request beside endless bulk work waits for the pass or chunk under way and for no other."""
    simulation = Simulation(FixedCosts.of(0.002, 0.004), LIMITS)
    bulk = flood(Lane.BULK, key=OTHER_KEY)
    bulk += [Request(lane=Lane.BULK, key=OTHER_KEY, chunks=200, is_only_chunks=True)]
    hurried = [Request(announced_at=0.05 + 0.1 * place, lane=Lane.INTERACTIVE) for place in range(10)]
    simulation.run([*bulk, *hurried], until=1.2)

    waits = [
        ran.started_at - entry.enqueued_at
        for ran in simulation.ran
        for entry in ran.candidates
        if entry.lane is Lane.INTERACTIVE
    ]
    assert 10 == len(waits)
    assert SLICE + 0.0021 >= max(waits)


def test_passes_wait_for_one_chunk_at_most() -> None:
    """Constant amplified work in the same lane delays each sparse pass by at most the chunk under way."""
    simulation = Simulation(FixedCosts.of(0.002, 0.001, chunk=0.02), LIMITS)
    amplified = [Request(chunks=1000, is_only_chunks=True) for _ in range(4)]
    cheap = [Request(announced_at=0.05 + 0.05 * place) for place in range(20)]
    simulation.run([*amplified, *cheap], until=1.2)

    waits = [
        ran.started_at - entry.enqueued_at for ran in simulation.ran for entry in ran.candidates if entry.work is None
    ]
    assert 20 == len(waits)
    assert 0.02 + LIMITS.window_seconds >= max(waits)


def test_a_full_pass_does_not_make_the_next_wait_for_chunks() -> None:
    """Bursts of passes that take half of the device wait for the chunk under way, however long the pass before them was."""
    simulation = Simulation(FixedCosts.of(0.0, 0.02, chunk=0.02), Limits(window_seconds=0.0, max_pass_seconds=1.0))
    amplified = [Request(chunks=1000, is_only_chunks=True) for _ in range(4)]
    # A full pass of 16 rows, 0.32 s, and behind it at once somebody else's.
    bursts = [
        Request(announced_at=0.8 * turn + (0.1 if place == 16 else 0.0)) for turn in range(8) for place in range(17)
    ]
    simulation.run([*amplified, *bursts], until=6.4)

    passes = [ran for ran in simulation.ran if not ran.decision.is_chunk]
    assert 8 * 17 == sum(len(ran.candidates) for ran in passes)
    busy = [(ran.started_at, ran.ended_at) for ran in passes]
    waits = [
        ran.started_at - max([entry.enqueued_at, *(end for start, end in busy if start < ran.started_at)])
        for ran in passes
        for entry in ran.candidates
    ]
    assert 0.02 + 1e-6 >= max(waits)


def test_passes_without_end_leave_chunks_a_quarter() -> None:
    """Where passes alone would fill a lane, amplified work beside them gets a quarter of it, and is never far behind."""
    simulation = Simulation(FixedCosts.of(0.002, 0.001, chunk=0.02), LIMITS)
    amplified = [Request(chunks=10**6, is_only_chunks=True, key=OTHER_KEY) for _ in range(4)]
    simulation.run([*amplified, *flood(Lane.STANDARD)], until=8.0)

    chunks = sum(ran.ended_at - ran.started_at for ran in simulation.ran if ran.decision.is_chunk)
    assert 0.22 <= chunks / 8.0 <= 0.26


def test_amplified_works_go_on_in_turn() -> None:
    """Of several works of one lane none is done before another has half its chunks."""
    simulation = Simulation(FixedCosts.of(0.002, 0.001), LIMITS)
    requests = [Request(chunks=8, caller=name) for name in "abcd"]
    ran = simulation.run(requests)
    order = [one.requests[0].caller for one in ran if one.decision.is_chunk]

    first_done = min(max(place for place, name in enumerate(order) if name == caller) for caller in "abcd")
    assert all(order[: first_done + 1].count(caller) >= 4 for caller in "abcd")


@settings(max_examples=8, deadline=None)
@given(
    st.integers(2, 4),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([0.0, 0.003]),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
)
def test_callers_share_a_lane_evenly(callers, max_rows, fixed, floods):
    """While several callers wait in a lane, none gets more than a slice ahead, whatever the numbers they send."""
    seconds = 0.3
    simulation = Simulation(FixedCosts.of(fixed, 0.002), LIMITS)
    requests = [
        Request(caller=str(caller), max_rows=max_rows) for caller in range(callers) for _ in range(300 * floods[caller])
    ]
    simulation.run(requests, until=seconds)

    had = simulation.seconds_by("caller", seconds)
    assert callers == len(had)
    assert 2 * SLICE + 0.02 >= max(had.values()) - min(had.values())


def test_a_caller_saves_nothing_up_by_being_away() -> None:
    """Who comes later starts even with who has been there, neither ahead nor behind."""
    simulation = Simulation(FixedCosts.of(0.001, 0.002), LIMITS)
    early = [Request(caller="early", max_rows=1, repeats=10**6) for _ in range(6)]
    late = [Request(caller="late", max_rows=1, announced_at=0.5, repeats=10**6) for _ in range(6)]
    simulation.run([*early, *late], until=1.0)

    after = [ran for ran in simulation.ran if ran.started_at >= 0.5]
    had = {name: sum(ran.requests[0].caller == name for ran in after) * 0.003 for name in ("early", "late")}
    assert 0.05 >= abs(had["early"] - had["late"])


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    """Requests of every sort; some expire."""
    milliseconds = st.integers(0, 60).map(lambda found: found / 1000)
    return draw(
        st.lists(
            st.builds(
                Request,
                key=st.sampled_from([KEY, OTHER_KEY]),
                announced_at=milliseconds,
                decode_seconds=milliseconds,
                depth=st.integers(0, 3),
                max_rows=st.just(4),
                lane=st.sampled_from(LANES),
                caller=st.sampled_from("xyz"),
                patience=st.one_of(st.just(math.inf), milliseconds),
                chunks=st.integers(0, 4),
            ),
            max_size=25,
        )
    )


@settings(max_examples=60, deadline=None)
@given(workloads(), st.sampled_from([0.0, 0.003, 0.02]), st.sampled_from([0.0, 0.4]))
def test_everything_runs_once_or_expires_and_the_device_idles_only_for_company(requests, fixed, steeper):
    """Every pass and every chunk runs; while something waits the device idles only within a window, for known reasons."""
    simulation = Simulation(FixedCosts.of(fixed, 0.001, steeper), LIMITS)
    simulation.run(requests)

    passes = [entry for ran in simulation.ran if not ran.decision.is_chunk for entry in ran.candidates]
    expired = [entry for entry in simulation.expired if entry.work is None]
    assert len(requests) == len(passes) + len(expired)
    kept = [request for request in requests if math.isinf(request.patience)]
    chunks = [ran for ran in simulation.ran if ran.decision.is_chunk and math.isinf(ran.requests[0].patience)]
    assert sum(request.chunks for request in kept) == len(chunks)
    for start, end in simulation.idle:
        assert LIMITS.window_seconds + 1e-9 >= end - start


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 4]))
def test_nobody_starves(seed, max_rows):
    """At nine tenths of what the device can do, in all lanes and callers, every request runs within a bound."""
    per_row, fixed, chance = 0.002, 0.001, random.Random(seed)  # noqa: S311 - likewise
    rate = 0.9 / (fixed / max_rows + per_row)
    times = itertools.accumulate(chance.expovariate(rate) for _ in range(200))
    requests = [
        Request(
            announced_at=time,
            lane=chance.choice(LANES),
            caller=chance.choice("xyz"),
            key=chance.choice([KEY, OTHER_KEY]),
            max_rows=max_rows,
        )
        for time in times
    ]
    simulation = Simulation(FixedCosts.of(fixed, per_row), LIMITS)
    simulation.run(requests)

    waits = [ran.started_at - entry.enqueued_at for ran in simulation.ran for entry in ran.candidates]
    assert 200 == len(waits)
    assert max(waits) < 0.5


def test_the_lowest_lane_runs_within_a_bound_under_overload() -> None:
    """However much the lanes above are asked for, a bulk request waits for its tenth and no longer."""
    simulation = Simulation(FixedCosts.of(0.001, 0.002), LIMITS)
    requests = flood(Lane.INTERACTIVE) + flood(Lane.STANDARD)
    requests += [Request(lane=Lane.BULK, max_rows=1, announced_at=0.1 * place) for place in range(10)]
    simulation.run(requests, until=2.5)

    waits = [
        ran.started_at - entry.enqueued_at
        for ran in simulation.ran
        for entry in ran.candidates
        if entry.lane is Lane.BULK
    ]
    assert 10 == len(waits)
    # One pass of 3 ms every 100 ms is below a tenth: each goes as soon as it is due.
    assert 2 * SLICE >= max(waits)


def test_eight_callers_that_come_back_ride_together() -> None:
    """A closed loop of eight settles at passes of eight where the fixed part is worth the wait, instead of one and seven."""
    simulation = Simulation(FixedCosts.of(0.02, 0.001), Limits(window_seconds=0.005))
    thinking = [(0.001, 0.003), (0.002, 0.0015), (0.0005, 0.004)]
    ran = simulation.run(
        [Request(max_rows=16, repeats=30, think_seconds=thinking[place % 3]) for place in range(8)], until=1.0
    )

    assert [8] * 10 == [len(one.requests) for one in ran[5:15]]


def test_open_arrivals_are_not_waited_for_in_vain() -> None:
    """Where nobody comes back at once, waiting behind a pass is soon given up."""
    simulation = Simulation(FixedCosts.of(0.02, 0.001), Limits(window_seconds=0.005))
    # Each second request comes while the pass of the one before runs, and nobody behind its end.
    simulation.run([Request(announced_at=place * 0.05 + (place % 2) * -0.04) for place in range(1, 60)])

    assert not [start for start, _ in simulation.idle if start > 1.5]


@pytest.mark.parametrize("lane", LANES)
def test_one_lane_alone_gets_everything(lane):
    """Weights only count against others."""
    simulation = Simulation(FixedCosts.of(0.001, 0.002), LIMITS)
    simulation.run([Request(lane=lane) for _ in range(60)])

    assert not simulation.idle

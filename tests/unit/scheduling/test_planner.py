"""The planner, by properties: whatever waits, whatever is arriving, whenever it is asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device import KEY, OTHER_KEY, FixedCosts, Request, Simulation, candidate

from camserve.server.jobs import Lane
from camserve.server.scheduling.costs import PRIOR, Line
from camserve.server.scheduling.planner import Cut, Decision, Limits, decide
from camserve.server.scheduling.shares import Shares
from camserve.server.scheduling.work import BatchKey, Candidate, WorkKey

WINDOW = 0.005
LIMITS = Limits(window_seconds=WINDOW, max_pass_seconds=0.1)
COSTS = FixedCosts.of(fixed=0.003, per_row=0.001)
KEYS = [
    KEY,
    BatchKey(model="a", version="1", shape=(3, 64, 64)),
    BatchKey(model="a", version="2", shape=(3, 32, 32)),
    OTHER_KEY,
    BatchKey(model="b", version="1", shape=(3, 32, 32), form="other"),
]
MAX_ROWS = dict(zip(KEYS, (4, 4, 1, 3, 3), strict=True))
MODELS = sorted({(key.model, key.version) for key in KEYS})
WORK = WorkKey(model="a", version="1", method="score-cam")

# Round milliseconds, so that ties and exact ends of windows happen.
moments = st.integers(0, 40).map(lambda milliseconds: milliseconds / 1000)
arrivals = st.dictionaries(st.sampled_from(MODELS), st.integers(0, 3))
ends = st.dictionaries(st.sampled_from(MODELS), moments)


@st.composite
def queues(draw: st.DrawFn, largest: int = 20) -> list[Candidate]:
    """What waits, in any order, tickets in order of arrival."""
    times = sorted(draw(st.lists(moments, max_size=largest)))
    waiting = []
    for ticket, time in enumerate(times):
        key = draw(st.sampled_from(KEYS))
        waiting.append(
            candidate(
                ticket,
                key=key,
                max_rows=MAX_ROWS[key],
                depth=draw(st.integers(0, 3)),
                lane=draw(st.sampled_from(Lane)),
                caller=draw(st.sampled_from("xyz")),
                enqueued_at=time,
                deadline=draw(st.one_of(st.just(math.inf), moments.map(lambda moment, time=time: time + moment))),
                work=draw(st.sampled_from([None, None, None, WORK])),
            )
        )
    return draw(st.permutations(waiting))


@st.composite
def usages(draw: st.DrawFn) -> Shares:
    """Accounts after some passes."""
    shares = Shares()
    for entry in draw(queues(largest=8)):
        decided = decide([entry], shares=shares, costs=COSTS, limits=LIMITS, now=0.0)
        shares = decided.shares
    return shares


def plan(waiting: Sequence[Candidate], now: float = 0.0, **changes: object) -> Decision:
    """Decides with nobody having had anything, nothing arriving."""
    given: dict[str, object] = {"shares": Shares(), "costs": COSTS, "limits": LIMITS, **changes}
    return decide(waiting, now=now, **given)


@given(queues(), usages(), arrivals, ends, moments)
def test_a_decision_is_a_batch_or_a_chunk_that_can_run(waiting, shares, arriving, returning, now):
    """One key, no more rows than the model takes, only tickets that wait and have not expired, none twice; or one chunk."""
    decided = plan(waiting, now, shares=shares, arriving=arriving, returning=returning)
    by_ticket = {entry.ticket: entry for entry in waiting}
    chosen = [by_ticket[ticket] for ticket in decided.tickets]

    assert len(set(decided.tickets)) == len(decided.tickets)
    assert all(entry.deadline > now for entry in chosen)
    if decided.is_chunk:
        assert [WORK] == [entry.work for entry in chosen]
    elif chosen:
        assert 1 == len({entry.key for entry in chosen})
        assert MAX_ROWS[chosen[0].key] >= len(chosen)
        assert {None} == {entry.work for entry in chosen}
        assert decided.cut is not None
    if chosen:
        assert 1.0 == pytest.approx(sum(charge.part for charge in decided.charges))
        assert {(entry.lane, entry.caller) for entry in chosen} == {
            (charge.lane, charge.caller) for charge in decided.charges
        }


@given(queues(), usages(), moments)
def test_work_is_conserved(waiting, shares, now):
    """With nobody to wait for, the device runs something whenever something unexpired waits."""
    waits = any(entry.deadline > now for entry in waiting)

    assert waits == bool(plan(waiting, now, shares=shares).tickets)


@given(queues(), usages(), arrivals, ends, moments)
def test_waiting_ends_with_a_window(waiting, shares, arriving, returning, now):
    """A decision to wait says until when, at most a window ahead of now, and by then something runs or has expired."""
    decided = plan(waiting, now, shares=shares, arriving=arriving, returning=returning)
    live = [entry for entry in waiting if entry.deadline > now]
    if decided.tickets or not live:
        assert math.inf == decided.ask_again_at
        return

    assert now < decided.ask_again_at <= now + WINDOW + max((end - now for end in returning.values()), default=0) + 1
    then = decided.ask_again_at
    again = plan(waiting, then, shares=shares, arriving=arriving, returning=returning)
    assert again.tickets or all(entry.deadline <= then for entry in live)


@given(st.data(), queues(), usages(), arrivals, ends, moments)
def test_the_order_of_the_list_does_not_matter(data, waiting, shares, arriving, returning, now):
    """The decision follows from what waits, not from how it was listed."""
    shuffled = data.draw(st.permutations(waiting))
    kept = {"shares": shares, "arriving": arriving, "returning": returning}

    one, other = plan(waiting, now, **kept), plan(shuffled, now, **kept)

    assert (one.tickets, one.ask_again_at, one.cut) == (other.tickets, other.ask_again_at, other.cut)


def test_nothing_waits() -> None:
    """An empty queue asks to be asked again only when something comes."""
    assert Decision(shares=Shares()) == plan([], 1.0, arriving={("a", "1"): 3})


def test_a_ready_group_goes_while_a_more_urgent_one_waits_for_company() -> None:
    """Waiting for one model's arrivals does not hold up another model."""
    urgent = candidate(0, deadline=1.0)
    patient = candidate(1, key=OTHER_KEY)

    assert (1,) == plan([urgent, patient], 0.001, arriving={("a", "1"): 1}).tickets


def test_methods_and_lanes_ride_together() -> None:
    """Free rows are filled from any lane, by deadline; each lane pays for its rows."""
    waiting = [
        candidate(0, lane=Lane.BULK),
        candidate(1, lane=Lane.STANDARD),
        candidate(2, lane=Lane.INTERACTIVE),
        candidate(3, lane=Lane.BULK),
        candidate(4, lane=Lane.BULK, deadline=1.0),
    ]
    decided = plan(waiting)

    assert (2, 4, 1, 0) == decided.tickets
    assert Cut.ROWS == decided.cut
    assert {Lane.INTERACTIVE: 0.25, Lane.STANDARD: 0.25, Lane.BULK: 0.5} == {
        charge.lane: charge.part for charge in decided.charges
    }


def test_a_rider_whose_lane_has_had_its_share_stays_when_somebody_else_waits() -> None:
    """Riding for free would take the device from the lanes that cannot ride."""
    bulk = [candidate(ticket, lane=Lane.BULK, max_rows=16) for ticket in range(1, 12)]
    waiting = [candidate(0, lane=Lane.INTERACTIVE, max_rows=16), *bulk]
    other = candidate(20, lane=Lane.STANDARD, key=OTHER_KEY)
    sated = Shares().charged(plan([candidate(0, lane=Lane.BULK)]).charges, 5.0, LIMITS.weights)

    assert 12 == len(plan(waiting, shares=sated).tickets)
    decided = plan([*waiting, other], shares=sated)
    assert ((0,), Cut.SHARE) == (decided.tickets, decided.cut)


def test_who_is_far_ahead_does_not_fill_the_pass_of_another() -> None:
    """Rows of a caller that had the last pass add a slice at most to that of one who had none; cheap ones all ride."""
    costs = FixedCosts.of(fixed=0.01, per_row=0.01)
    limits = Limits(max_pass_seconds=1.0, slice_seconds=0.02)
    greedy = [candidate(ticket, caller="greedy", max_rows=4) for ticket in range(8)]
    modest = candidate(8, caller="modest", max_rows=4)
    first = plan(greedy, costs=costs, limits=limits)
    assert ((0, 1, 2, 3), Cut.ROWS) == (first.tickets, first.cut)

    second = plan([*greedy[4:], modest], shares=first.shares, costs=costs, limits=limits)
    assert ((8, 4, 5), Cut.CALLER) == (second.tickets, second.cut)
    cheap = FixedCosts.of(fixed=0.05, per_row=0.001)
    assert 4 == len(plan([*greedy[4:], modest], shares=first.shares, costs=cheap, limits=limits).tickets)


def test_callers_that_ask_alike_fill_passes() -> None:
    """Among many of them some have had a row more than others, which makes no pass smaller."""
    costs = FixedCosts.of(fixed=0.0, per_row=0.05)
    limits = Limits(max_pass_seconds=10.0, slice_seconds=0.001)
    shares, waiting = Shares(), [candidate(ticket, caller=f"c{ticket % 6}", max_rows=4) for ticket in range(12)]
    for _ in range(3):
        decided = plan(waiting, shares=shares, costs=costs, limits=limits)
        assert 4 == len(decided.tickets)
        shares = decided.shares
        waiting = [entry for entry in waiting if entry.ticket not in decided.tickets]


def test_a_batch_is_no_longer_than_a_slice() -> None:
    """Rows are added only while the pass stays within the slice, but one row runs whatever it takes."""
    waiting = [candidate(ticket, max_rows=16) for ticket in range(8)]
    decided = plan(waiting, costs=FixedCosts.of(fixed=0.01, per_row=0.03))

    assert ((0, 1, 2), Cut.SLICE) == (decided.tickets, decided.cut)
    assert 1 == len(plan(waiting, costs=FixedCosts.of(fixed=1.0, per_row=0.03)).tickets)


def test_more_rows_do_not_make_a_deadline_pass() -> None:
    """An urgent row takes along only as many as it has time for."""
    waiting = [candidate(0, deadline=0.0055), *(candidate(ticket) for ticket in range(1, 4))]
    decided = plan(waiting)

    assert ((0, 1), Cut.DEADLINE) == (decided.tickets, decided.cut)


def test_a_deadline_ends_the_waiting() -> None:
    """With no slack left nobody is waited for."""
    waiting = [candidate(0, deadline=0.007)]

    assert 0.003 == pytest.approx(plan(waiting, arriving={("a", "1"): 1}).ask_again_at)
    decided = plan(waiting, 0.003, arriving={("a", "1"): 1})
    assert ((0,), Cut.DEADLINE) == (decided.tickets, decided.cut)


def test_who_cannot_make_it_lets_the_others_go_first() -> None:
    """A deadline that would pass even alone is served last, and not dropped while nobody else waits."""
    lost = candidate(0, deadline=0.002, max_rows=1)
    waiting = [lost, candidate(1, deadline=0.02, max_rows=1)]

    assert (1,) == plan(waiting).tickets
    assert (0,) == plan([lost]).tickets


def test_one_in_a_hurry_does_not_make_a_full_pass_late() -> None:
    """A small pass for the hurried goes first only if it makes fewer late than it saves."""
    hurried = candidate(0, deadline=0.0045, max_rows=4)
    full = [candidate(ticket, deadline=0.0075, max_rows=4) for ticket in range(1, 5)]

    assert (1, 2, 3, 4) == plan([hurried, *full]).tickets
    assert (0,) == plan([hurried, *(candidate(ticket, deadline=0.012, max_rows=4) for ticket in range(1, 5))]).tickets


def test_callers_that_come_back_are_waited_for_when_that_pays() -> None:
    """Behind a pass the device waits for those it answered, for as long as another pass would cost beyond its rows."""
    first = [candidate(0)]
    returning = {("a", "1"): 0.0}

    assert WINDOW == plan(first, returning=returning, costs=FixedCosts.of(fixed=0.02, per_row=0.001)).ask_again_at
    assert 0.003 == plan(first, returning=returning).ask_again_at
    assert (0,) == plan(first, returning=returning, costs=FixedCosts.of(fixed=0.0, per_row=0.02)).tickets
    cold = FixedCosts(dict.fromkeys(range(4), PRIOR))
    assert (0,) == plan(first, returning=returning, costs=cold).tickets


def test_the_urgent_head_goes_first_when_depths_go_apart() -> None:
    """Deep and shallow taps in passes of their own, where that is cheaper; that of the more urgent row first."""
    steep = FixedCosts({0: Line(0.001, 0.001), 1: Line(0.001, 0.002), 2: Line(0.001, 0.010)})
    waiting = [candidate(0, depth=0), candidate(1, depth=2), candidate(2, depth=0), candidate(3, depth=2)]

    decided = plan(waiting, costs=steep)
    assert ((0, 2), Cut.DEPTH) == (decided.tickets, decided.cut)
    urgent = [candidate(0, depth=0), candidate(1, depth=2, deadline=0.5), candidate(2, depth=0)]
    assert (1,) == plan(urgent, costs=steep).tickets
    flat = FixedCosts({0: Line(0.01, 0.001), 1: Line(0.01, 0.001), 2: Line(0.01, 0.0012)})
    assert (0, 1, 2, 3) == plan(waiting, costs=flat).tickets


lines = st.lists(st.tuples(st.floats(0, 0.02), st.floats(0.0001, 0.02)), min_size=3, max_size=3).map(
    lambda found: dict(
        enumerate(Line(sum(f for f, _ in found[: i + 1]), sum(r for _, r in found[: i + 1])) for i in range(3))
    )
)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), lines)
def test_riding_together_or_apart_is_never_clearly_worse(depths, by_depth):
    """What waits takes no longer than always together, and little more than the best of all splits by depth."""
    simulation = Simulation(FixedCosts(by_depth), Limits(max_pass_seconds=math.inf))
    ran = simulation.run([Request(depth=depth, max_rows=6) for depth in depths])
    taken = sum(one.ended_at - one.started_at for one in ran)

    ordered = sorted(depths)
    best = math.inf
    for breaks in itertools.product((False, True), repeat=len(ordered) - 1):
        parts: list[list[int]] = [[ordered[0]]]
        for depth, is_break in zip(ordered[1:], breaks, strict=True):
            if is_break:
                parts.append([depth])
            else:
                parts[-1].append(depth)
        best = min(best, sum(by_depth[part[-1]].seconds(len(part)) for part in parts))

    assert len(depths) == sum(len(one.requests) for one in ran)
    assert taken <= by_depth[ordered[-1]].seconds(len(ordered)) + 1e-12
    assert taken <= best / 0.75 + 1e-12


@settings(deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_no_more_deadlines_are_missed_than_must_be(deadlines):
    """On jobs of one unit with deadlines, as many are on time as in the best of all orders."""
    unit = Limits(window_seconds=0, max_pass_seconds=math.inf)
    simulation = Simulation(FixedCosts.of(fixed=1.0, per_row=0.0), unit)
    # Half a unit of slack: the ends of passes are not the deadlines themselves.
    ran = simulation.run([Request(max_rows=1, patience=deadline + 0.5) for deadline in deadlines])
    on_time = sum(one.ended_at <= one.candidates[0].deadline for one in ran)

    best = max(
        sum(place + 1 <= deadline + 0.5 for place, deadline in enumerate(order))
        for order in itertools.permutations(deadlines)
    )
    assert best == on_time


@given(st.lists(st.integers(1, 29), min_size=1, max_size=12))
def test_within_a_lane_the_earliest_deadline_goes_first(deadlines):
    """Jobs of one unit that can all be on time run in order of deadline, then of arrival."""
    simulation = Simulation(FixedCosts.of(fixed=0.001, per_row=0.0), LIMITS)
    ran = simulation.run([Request(max_rows=1, patience=0.1 + deadline) for deadline in deadlines])

    assert sorted((one.candidates[0].deadline, one.candidates[0].ticket) for one in ran) == [
        (one.candidates[0].deadline, one.candidates[0].ticket) for one in ran
    ]


def test_patience_ends() -> None:
    """A request without a deadline is overtaken by those with less time than our patience, not by those with more."""
    waiting = [
        candidate(0, max_rows=1),
        candidate(1, max_rows=1, deadline=90.0),
        candidate(2, max_rows=1, deadline=15.0),
    ]

    order = []
    while waiting:
        (ticket,) = plan(waiting).tickets
        order.append(ticket)
        waiting = [entry for entry in waiting if entry.ticket != ticket]
    assert [2, 0, 1] == order

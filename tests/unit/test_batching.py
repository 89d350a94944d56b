"""The planner, by properties: whatever waits, whatever is arriving, whenever it is asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from camserve.server.batching import BatchKey, Plan, Waiting, plan

WINDOW = 0.005
KEYS = [
    BatchKey(model="a", version="1", shape=(3, 32, 32), dtype="float32"),
    BatchKey(model="a", version="1", shape=(3, 64, 64), dtype="float32"),
    BatchKey(model="a", version="2", shape=(3, 32, 32), dtype="float32"),
    BatchKey(model="b", version="1", shape=(3, 32, 32), dtype="float32"),
]
MAX_ROWS = dict(zip(KEYS, (4, 4, 1, 3), strict=True))
MODELS = sorted({(key.model, key.version) for key in KEYS})

# Round milliseconds, so that ties and exact ends of windows happen.
moments = st.integers(0, 40).map(lambda milliseconds: milliseconds / 1000)
arrivals = st.dictionaries(st.sampled_from(MODELS), st.integers(0, 3))


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    """Requests in any order, tickets in order of arrival."""
    times = sorted(draw(st.lists(moments, max_size=20)))
    waiting = []
    for ticket, time in enumerate(times):
        key = draw(st.sampled_from(KEYS))
        deadline = draw(st.one_of(st.just(math.inf), moments.map(lambda moment, time=time: time + moment)))
        waiting.append(Waiting(ticket=ticket, key=key, max_rows=MAX_ROWS[key], enqueued_at=time, deadline=deadline))
    return draw(st.permutations(waiting))


def urgency(entry: Waiting) -> tuple[float, int]:
    """Earliest deadline, then arrival."""
    return entry.deadline, entry.ticket


def is_ready(group: Sequence[Waiting], arriving: Mapping[tuple[str, str], int], now: float) -> bool:
    """The rule in words: full, nobody to wait for, or the window is over."""
    key = group[0].key
    return (
        len(group) >= MAX_ROWS[key]
        or not arriving.get((key.model, key.version), 0)
        or now >= min(entry.enqueued_at for entry in group) + WINDOW
    )


def groups_of(waiting: Sequence[Waiting]) -> dict[BatchKey, list[Waiting]]:
    """What waits, by key."""
    return {key: group for key in KEYS if (group := [entry for entry in waiting if entry.key == key])}


@given(queues(), arrivals, moments)
def test_a_plan_is_a_batch_that_can_run(waiting, arriving, now):
    """One key, no more rows than the model takes, only tickets that wait, none of them twice."""
    tickets = plan(waiting, arriving, window_seconds=WINDOW, now=now).tickets
    by_ticket = {entry.ticket: entry for entry in waiting}

    assert set(tickets) <= set(by_ticket)
    assert len(set(tickets)) == len(tickets)
    if tickets:
        keys = {by_ticket[ticket].key for ticket in tickets}
        assert 1 == len(keys)
        assert MAX_ROWS[keys.pop()] >= len(tickets)


@given(queues(), arrivals, moments)
def test_the_most_urgent_ready_group_goes_first_and_full(waiting, arriving, now):
    """The ready group with the most urgent request runs: its most urgent rows in order, as many as fit."""
    ready = [group for group in groups_of(waiting).values() if is_ready(group, arriving, now)]
    expected: tuple[int, ...] = ()
    if ready:
        chosen = min(ready, key=lambda group: min(map(urgency, group)))
        rows = sorted(chosen, key=urgency)[: MAX_ROWS[chosen[0].key]]
        expected = tuple(entry.ticket for entry in rows)

    assert expected == plan(waiting, arriving, window_seconds=WINDOW, now=now).tickets


@given(queues(), moments)
def test_the_device_never_idles_when_nothing_is_arriving(waiting, now):
    """With nobody to wait for, whatever waits runs at once."""
    assert bool(waiting) == bool(plan(waiting, {}, window_seconds=WINDOW, now=now).tickets)


@given(queues(), arrivals, moments)
def test_waiting_ends_with_the_first_window(waiting, arriving, now):
    """A plan that waits says until when: the end of the earliest window, and then something runs."""
    decided = plan(waiting, arriving, window_seconds=WINDOW, now=now)
    if decided.tickets or not waiting:
        assert math.inf == decided.ask_again_at
        return

    assert min(entry.enqueued_at for entry in waiting) + WINDOW == decided.ask_again_at
    assert now < decided.ask_again_at
    assert plan(waiting, arriving, window_seconds=WINDOW, now=decided.ask_again_at).tickets


@given(st.data(), queues(), arrivals, moments)
def test_the_order_of_the_list_does_not_matter(data, waiting, arriving, now):
    """The plan follows from what waits, not from how it was listed."""
    shuffled = data.draw(st.permutations(waiting))

    assert plan(waiting, arriving, window_seconds=WINDOW, now=now) == plan(
        shuffled, arriving, window_seconds=WINDOW, now=now
    )


def test_nothing_waits() -> None:
    """An empty queue asks to be asked again only when something comes."""
    assert Plan() == plan([], {("a", "1"): 3}, window_seconds=WINDOW, now=1.0)


def test_a_ready_group_goes_while_a_more_urgent_one_waits_for_company() -> None:
    """Waiting for one model's arrivals does not hold up another model."""
    urgent = Waiting(ticket=0, key=KEYS[0], max_rows=4, enqueued_at=0.0, deadline=1.0)
    patient = Waiting(ticket=1, key=KEYS[3], max_rows=3, enqueued_at=0.0)

    decided = plan([urgent, patient], {("a", "1"): 1}, window_seconds=WINDOW, now=0.001)

    assert Plan(tickets=(1,)) == decided


@dataclasses.dataclass(frozen=True)
class Request:
    """One request of a simulated workload."""

    key: BatchKey
    announced_at: float
    decode_seconds: float
    deadline: float


@dataclasses.dataclass(frozen=True)
class Ran:
    """When one was decoded, when it ran, how long the device had been idle then, and how many ran with it."""

    decoded_at: float
    started_at: float
    idle_since: float


def simulate(requests: Sequence[Request], pass_seconds: float) -> list[Ran]:
    """Runs a workload with a clock that jumps from event to event, as `DeviceQueue` and `dispatch` do in real time."""
    to_come = sorted(
        ((request.announced_at + request.decode_seconds, request) for request in requests), key=lambda pair: pair[0]
    )
    tickets = iter(range(len(to_come)))
    queue: dict[int, Waiting] = {}
    ran: list[Ran] = []
    now = idle_since = 0.0
    while to_come or queue:
        while to_come and to_come[0][0] <= now:
            decoded_at, request = to_come.pop(0)
            ticket = next(tickets)
            queue[ticket] = Waiting(
                ticket=ticket,
                key=request.key,
                max_rows=MAX_ROWS[request.key],
                enqueued_at=decoded_at,
                deadline=request.deadline,
            )
        arriving: dict[tuple[str, str], int] = {}
        for _, request in to_come:
            if request.announced_at <= now:
                model = (request.key.model, request.key.version)
                arriving[model] = arriving.get(model, 0) + 1
        decided = plan(list(queue.values()), arriving, window_seconds=WINDOW, now=now)
        if decided.tickets:
            batch = [queue.pop(ticket) for ticket in decided.tickets]
            ran += [Ran(decoded_at=entry.enqueued_at, started_at=now, idle_since=idle_since) for entry in batch]
            now = idle_since = now + pass_seconds
            continue
        now = min(decided.ask_again_at, to_come[0][0] if to_come else math.inf)
        assert not math.isinf(now), "the planner waits for nothing"
    return ran


workloads = st.lists(
    st.builds(
        Request,
        key=st.sampled_from(KEYS),
        announced_at=moments,
        decode_seconds=moments,
        deadline=st.one_of(st.just(math.inf), moments),
    ),
    max_size=30,
)


@settings(max_examples=60)
@given(workloads, st.sampled_from([0.0005, 0.003, 0.02]))
def test_every_request_runs_once_and_an_idle_device_waits_at_most_the_window(requests, pass_seconds):
    """Nobody starves; whoever finds the device idle runs no later than the window after being decoded."""
    ran = simulate(requests, pass_seconds)

    assert len(requests) == len(ran)
    for entry in ran:
        if entry.idle_since <= entry.decoded_at:
            assert WINDOW + 1e-9 >= entry.started_at - entry.decoded_at

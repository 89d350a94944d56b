"""The turnstile: each caller is counted by itself, and who has left is forgotten."""

from __future__ import annotations

import contextlib

import pytest

from camserve.server.callers import CallerLimits
from camserve.server.callers.turnstile import _MOST_REMEMBERED, Turnstile
from camserve.server.comebacks import LONGEST_RETRY_SECONDS, SHORTEST_RETRY_SECONDS
from camserve.server.errors import Overloaded, Reason
from camserve.server.metrics import Metrics

RATE = CallerLimits(requests_per_second=2, burst=3)
PLACES = CallerLimits(concurrency=2)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time it is."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """It stands still at first."""
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    """Instruments of its own for each test."""
    return Metrics()


def refusals(metrics: Metrics, reason: Reason) -> float:
    """How many were counted as refused for a reason."""
    return metrics.registry.get_sample_value("camserve_rejected_total", {"reason": reason}) or 0.0


def ask(turnstile: Turnstile, caller: str, times: int = 1) -> None:
    """Requests that are over at once."""
    for _ in range(times):
        with turnstile.request(caller):
            pass


def test_who_asks_too_often_is_told_when_to_come_back(clock, metrics):
    """A burst is let in, the next is refused with the exact time, counted, and let in when that is over."""
    turnstile = Turnstile(lambda _: RATE, metrics, clock=clock)
    ask(turnstile, "greedy", 3)
    clock.now += 0.1
    with pytest.raises(Overloaded, match="caller_requests_per_second") as caught:
        ask(turnstile, "greedy")
    assert (Reason.RATE_LIMITED, pytest.approx(0.4)) == (caught.value.reason, caught.value.retry_after_seconds)
    clock.now += caught.value.retry_after_seconds
    ask(turnstile, "greedy")

    assert 1 == refusals(metrics, Reason.RATE_LIMITED)


def test_refused_requests_cost_nothing(clock, metrics):
    """Who hammers at the turnstile is let in no later than who waits."""
    turnstile = Turnstile(lambda _: RATE, metrics, clock=clock)
    ask(turnstile, "greedy", 3)
    for _ in range(100):
        with pytest.raises(Overloaded):
            ask(turnstile, "greedy")
    clock.now += 0.5
    ask(turnstile, "greedy")

    assert 100 == refusals(metrics, Reason.RATE_LIMITED)


def test_who_has_too_many_under_way_is_told_when_to_come_back(clock, metrics):
    """The third at once is refused with a forecast by what the others took, and let in when one of them has ended."""
    turnstile = Turnstile(lambda _: PLACES, metrics, clock=clock)
    for _ in range(50):
        with turnstile.request("greedy"):
            clock.now += 4
    with turnstile.request("greedy"):
        with turnstile.request("greedy"), pytest.raises(Overloaded, match="caller_concurrency") as caught:
            ask(turnstile, "greedy")
        ask(turnstile, "greedy")

    assert (Reason.TOO_MANY_CONCURRENT, pytest.approx(4, rel=0.1)) == (
        caught.value.reason,
        caught.value.retry_after_seconds,
    )
    assert ("2", "2") == (caught.value.metadata["requests"], caught.value.metadata["limit"])
    assert 1 == refusals(metrics, Reason.TOO_MANY_CONCURRENT)


@pytest.mark.parametrize(("took", "told"), [(0.0, SHORTEST_RETRY_SECONDS), (1000.0, LONGEST_RETRY_SECONDS)])
def test_a_forecast_stays_within_reason(clock, metrics, took, told):
    """However short or long requests take."""
    turnstile = Turnstile(lambda _: PLACES, metrics, clock=clock)
    for _ in range(50):
        with turnstile.request("greedy"):
            clock.now += took
    with turnstile.request("greedy"), turnstile.request("greedy"), pytest.raises(Overloaded) as caught:
        ask(turnstile, "greedy")

    assert told == caught.value.retry_after_seconds


def test_places_are_given_back_after_an_error(clock, metrics):
    """A request that fails leaves nothing behind."""
    turnstile = Turnstile(lambda _: PLACES, metrics, clock=clock)
    for _ in range(5):
        with pytest.raises(RuntimeError, match="inside"), turnstile.request("one"):
            raise RuntimeError("inside")

    assert 0 == turnstile.remembered


def test_callers_do_not_count_for_each_other(clock, metrics):
    """What one has used up is there for another; and what one may take need not be what others may."""
    own = {"greedy": CallerLimits(requests_per_second=1, concurrency=1)}
    turnstile = Turnstile(lambda caller: own.get(caller, CallerLimits()), metrics, clock=clock)
    with turnstile.request("greedy"):
        with pytest.raises(Overloaded):
            ask(turnstile, "greedy")
        ask(turnstile, "other", 1000)
    with pytest.raises(Overloaded):
        ask(turnstile, "greedy")


def test_a_batch_is_let_in_as_a_whole_or_costs_nothing(clock, metrics):
    """Who comes back when told is let in: the rows that were refused have not used up what they waited for."""
    turnstile = Turnstile(lambda _: CallerLimits(requests_per_second=1, burst=4), metrics, clock=clock)

    def batch() -> None:
        with turnstile.request("one"), turnstile.request("one", rows=4, counted=1):
            pass

    batch()
    clock.now += 2.0
    with pytest.raises(Overloaded) as caught:
        batch()
    # One of the two was used by the call that brought the batch.
    assert pytest.approx(3.0) == caught.value.retry_after_seconds
    clock.now += caught.value.retry_after_seconds
    batch()

    assert 1 == refusals(metrics, Reason.RATE_LIMITED)


@pytest.mark.parametrize(
    ("limits", "reason", "setting"),
    [
        (CallerLimits(requests_per_second=1, burst=4), Reason.RATE_LIMITED, "caller_burst"),
        (CallerLimits(concurrency=4), Reason.TOO_MANY_CONCURRENT, "caller_concurrency"),
    ],
)
def test_a_batch_that_can_never_be_let_in_is_told_no_time(clock, metrics, limits, reason, setting):
    """It is told how many rows can, and nobody waits in vain; nothing of it stays."""
    turnstile = Turnstile(lambda _: limits, metrics, clock=clock)
    with (
        turnstile.request("one"),
        pytest.raises(Overloaded, match=f"at most 4 rows.*|.*{setting}") as caught,
        turnstile.request("one", rows=5, counted=1),
    ):
        pass

    assert (reason, None, "5") == (caught.value.reason, caught.value.retry_after_seconds, caught.value.metadata["rows"])
    assert setting == caught.value.metadata["setting"]
    clock.now += 1
    with turnstile.request("one"), turnstile.request("one", rows=4, counted=1):
        pass
    assert 1 == refusals(metrics, reason)


def test_nothing_is_kept_of_who_has_left(clock, metrics):
    """A caller that is not inside and has its full allowance is forgotten when others come."""
    turnstile = Turnstile(lambda _: RATE, metrics, clock=clock)
    for number in range(10_000):
        ask(turnstile, f"passer-by {number}")
        clock.now += 1

    assert _MOST_REMEMBERED // 4 + 1 >= turnstile.remembered


def test_addresses_without_number_do_not_fill_memory(clock, metrics):
    """Of very many that all come at once those who used most are kept: they gain nothing by the others."""
    turnstile = Turnstile(lambda _: CallerLimits(requests_per_second=0.001, burst=3), metrics, clock=clock)
    ask(turnstile, "greedy", 3)
    for number in range(3 * _MOST_REMEMBERED):
        ask(turnstile, f"address {number}")

    assert _MOST_REMEMBERED >= turnstile.remembered
    with pytest.raises(Overloaded):
        ask(turnstile, "greedy")


def test_limits_may_change_while_somebody_is_inside(clock, metrics):
    """The next request meets the new ones."""
    allowed = [PLACES]
    turnstile = Turnstile(lambda _: allowed[0], metrics, clock=clock)
    with contextlib.ExitStack() as inside:
        inside.enter_context(turnstile.request("one"))
        inside.enter_context(turnstile.request("one"))
        allowed[0] = CallerLimits(concurrency=3)
        inside.enter_context(turnstile.request("one"))
        allowed[0] = CallerLimits(concurrency=1)
        with pytest.raises(Overloaded):
            ask(turnstile, "one")
        allowed[0] = CallerLimits()
        ask(turnstile, "one")

    assert 0 == turnstile.remembered

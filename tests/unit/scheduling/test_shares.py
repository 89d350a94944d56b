"""Accounts: the least is due, absence saves nothing up, and what was charged too much is given back."""

from __future__ import annotations

import pytest

from camserve.server.jobs import Lane
from camserve.server.scheduling.planner import WEIGHTS
from camserve.server.scheduling.shares import PASS_WEIGHT, Account, Charge, Shares

BULK = Charge(Lane.BULK, "caller", is_chunk=False, part=1.0)


def test_newcomers_start_at_the_floor() -> None:
    """The floor is the least of those who waited; who was away counts as having had that much."""
    account = Account().charged({"one": 2.0, "other": 3.0}, present=["one", "other"])
    account = account.charged({"one": 2.0}, present=["one", "other"])

    assert (4.0, 3.0, 2.0) == (account.standing("one"), account.standing("other"), account.standing("new"))


def test_the_floor_only_rises() -> None:
    """Nobody gains by a correction of somebody else's account, nor falls below the floor by one of its own."""
    account = Account().charged({"one": 5.0}, present=["one"]).charged({"one": 1.0}, present=["one"])
    assert 5.0 == account.floor
    account = account.charged({"one": -4.0})

    assert 5.0 == account.standing("one")
    assert {} == account.used


def test_riders_get_no_further_ahead_than_their_ceiling() -> None:
    """What was free is not paid back for ever, and a ceiling never lowers what was due before."""
    account = Account().charged({"rider": 100.0}, ceilings={"rider": 3.0})
    assert 3.0 == account.standing("rider")
    account = account.charged({"rider": 4.0}).charged({"rider": 1.0}, ceilings={"rider": 3.0})

    assert 7.0 == account.standing("rider")


def test_lanes_pay_by_weight_and_get_back_what_was_too_much() -> None:
    """A second costs bulk six times as much as interactive; a correction restores the state without it."""
    charged = Shares().charged([BULK], 2.0, WEIGHTS, present={Lane.BULK: ([False], ["caller"])})
    corrected = charged.charged([BULK], -1.5, WEIGHTS)

    assert (2.0, 0.5) == (charged.lanes.standing(Lane.BULK), corrected.lanes.standing(Lane.BULK))
    assert 0.5 == corrected.of_callers(Lane.BULK).standing("caller")
    assert 0.5 == pytest.approx(PASS_WEIGHT * corrected.of_class(Lane.BULK).standing(BULK.is_chunk))
    hurried = Shares().charged([Charge(Lane.INTERACTIVE, "caller", is_chunk=False, part=1.0)], 2.0, WEIGHTS)
    assert 2.0 / 6 == pytest.approx(hurried.lanes.standing(Lane.INTERACTIVE))


def test_callers_without_number_do_not_fill_memory() -> None:
    """Of callers that came once only the largest accounts are kept."""
    account: Account[str] = Account()
    for number in range(1500):
        account = account.charged({str(number): 1.0 + number})

    assert 1024 == len(account.used)
    assert 1500.0 == account.standing("1499")

from __future__ import annotations

import pytest

from camserve.server.errors import Overloaded, Reason
from camserve.server.models.budget import Budget, Holder

MEBIBYTE = 1 << 20


def holder(name: str, *, size: int = 10, last_seen: float = 0.0, inside: int = 0) -> Holder:
    """A model of so many mebibytes."""
    return Holder(name=name, version="1", memory_bytes=size * MEBIBYTE, last_seen=last_seen, inside=inside)


def going(budget: Budget, *holders: Holder, size: int = 10) -> list[str]:
    """Who has to go for a model of so many mebibytes."""
    return [one.name for one in budget.leaving(holders, "new", "1", size * MEBIBYTE)]


def test_without_a_limit_everything_fits():
    """The default."""
    assert [] == going(Budget(), holder("a", size=10_000))


def test_what_fits_sends_nobody_away():
    """To the last byte."""
    assert [] == going(Budget(max_bytes=30 * MEBIBYTE, may_unload=True), holder("a"), holder("b"))


def test_who_was_not_used_for_longest_goes_first():
    """As many as it takes, and nobody whom a request is inside."""
    budget = Budget(max_bytes=35 * MEBIBYTE, may_unload=True)
    holders = [holder("a", last_seen=3), holder("b", last_seen=1, inside=1), holder("c", last_seen=2)]

    assert ["c"] == going(budget, *holders)
    assert ["c", "a"] == going(budget, *holders, size=20)


@pytest.mark.parametrize(
    ("may_unload", "advice"), [(False, "or set unload_idle_models"), (True, "the others are in use")]
)
def test_a_refusal_tells_who_holds_what(may_unload, advice):
    """And what can be done about it."""
    budget = Budget(max_bytes=20 * MEBIBYTE, may_unload=may_unload)

    with pytest.raises(
        Overloaded, match=rf"20\.0 MiB together, of which are held: b 1 12\.0 MiB, a 1 8\.0 MiB; .*{advice}"
    ) as found:
        going(budget, holder("a", size=8, inside=2), holder("b", size=12, inside=1))

    assert Reason.MODEL_MEMORY_EXHAUSTED is found.value.reason

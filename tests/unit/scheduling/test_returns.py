"""Who comes back: learnt from what came behind the ends of passes."""

from __future__ import annotations

from camserve.server.scheduling.returns import Returns

MODEL = ("a", "1")


def test_those_answered_are_expected_until_they_came() -> None:
    """Behind a pass as many are expected as it answered, within the window, less those who came."""
    returns = Returns(0.005)
    returns.ended(MODEL, 2, 1.0)

    assert {MODEL: 1.0} == returns.expected_since(1.001)
    assert {} == returns.expected_since(1.006)
    returns.came(MODEL, 1.001)
    assert {MODEL: 1.0} == returns.expected_since(1.002)
    returns.came(MODEL, 1.002)
    assert {} == returns.expected_since(1.003)


def test_who_never_comes_back_is_no_longer_expected() -> None:
    """After a few passes behind which nobody came, nobody is waited for; after some behind which all came, they are again."""
    returns = Returns(0.005)
    for second in range(10):
        returns.ended(MODEL, 1, second)
    assert {} == returns.expected_since(9.001)
    for second in range(10, 30):
        returns.ended(MODEL, 1, second)
        returns.came(MODEL, second + 0.002)

    returns.ended(MODEL, 1, 30)
    assert {MODEL: 30} == returns.expected_since(30.001)


def test_passes_in_quick_succession_count_together() -> None:
    """Whom a short pass overtook is still expected behind it."""
    returns = Returns(0.005)
    returns.ended(MODEL, 7, 1.0)
    returns.ended(MODEL, 1, 1.002)
    for _ in range(7):
        returns.came(MODEL, 1.003)

    assert {MODEL: 1.002} == returns.expected_since(1.004)
    returns.came(MODEL, 1.004)
    assert {} == returns.expected_since(1.004)


def test_models_are_apart() -> None:
    """One model's callers say nothing of another's."""
    returns = Returns(0.005)
    returns.ended(MODEL, 1, 1.0)
    returns.came(("b", "1"), 1.001)

    assert {MODEL: 1.0} == returns.expected_since(1.002)


def test_who_is_being_decoded_is_expected_as_well() -> None:
    """A caller that came back behind the last pass, and is not yet decoded, is waited for within the same window."""
    returns = Returns(0.005)
    returns.ended(MODEL, 1, 1.0)
    returns.came(MODEL, 1.001)

    assert {} == returns.expected_since(1.002)
    assert {MODEL: 1.0} == returns.expected_since(1.002, {MODEL: 1})
    assert {} == returns.expected_since(1.006, {MODEL: 1})

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camserve.client import RuleInfo
from camserve.server.rules import is_sampled

IDS = [f"request-{number}" for number in range(20_000)]


@pytest.mark.parametrize(
    ("rule", "request_id", "place"),
    [
        ("rejects", "part-0", 0x0FD71B022B0E5154),
        ("control", "part-0", 0xCD17D28E3022C1B4),
        ("control", "part-17", 0x5125AE270940D4E6),
        ("drift", "0" * 32, 0x54171D1E717FDBB0),
    ],
)
def test_the_formula_is_a_promise(rule, request_id, place):
    """The first bytes of each digest, as an auditor in another language computes them: taken above, left out at it."""
    share = place / 2**64

    assert is_sampled(rule, request_id, share * 1.000001)
    assert not is_sampled(rule, request_id, share * 0.999999)


@settings(deadline=None)  # A busy machine may take any time over one example.
@given(st.text(max_size=64), st.text(max_size=128), st.floats(0, 1))
def test_the_fate_of_a_request_depends_on_nothing_but_rule_id_and_share(rule, request_id, share):
    """The same again, the same as the client works out; a larger share takes no fewer; 0 takes none and 1 all."""
    taken = is_sampled(rule, request_id, share)

    assert taken is is_sampled(rule, request_id, share)
    assert taken is RuleInfo(name=rule, when="", sample=share, asks={}).takes(request_id)
    assert not taken or is_sampled(rule, request_id, min(1.0, share * 1.5))
    assert not is_sampled(rule, request_id, 0.0)
    assert is_sampled(rule, request_id, 1.0)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("rule", ["rejects", "drift", "a", "b"])
def test_the_share_that_is_taken_is_close_to_the_one_that_was_asked_for(rule, share):
    """Within five standard deviations of 20 000 independent draws."""
    taken = sum(is_sampled(rule, request_id, share) for request_id in IDS)

    assert abs(taken - share * len(IDS)) < 5 * (len(IDS) * share * (1 - share)) ** 0.5


def test_rules_of_one_share_take_other_requests():
    """Two tenths overlap in about a hundredth."""
    both = sum(is_sampled("a", request_id, 0.1) and is_sampled("b", request_id, 0.1) for request_id in IDS)

    assert 100 < both < 300

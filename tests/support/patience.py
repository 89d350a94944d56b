"""Deadlines for tests of what a deadline does, on machines that nobody knows the speed of.

How much time a request needs to get as far as a test wants is the machine's affair. A short deadline keeps the test short; where
the machine was too slow for it, or stood still meanwhile, a longer one is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from camserve.client import DeadlineExceeded

__all__ = ["DEADLINES", "under_a_deadline"]

_Answer = TypeVar("_Answer")

DEADLINES = (0.7, 3.0, 12.0, 48.0)
"""Seconds, each tried where those before were not enough."""


def under_a_deadline(
    ask: Callable[[float], _Answer], got_so_far: Callable[[_Answer], bool] = lambda _: True
) -> _Answer:
    """Asks with one deadline after another until one lets the request get so far as the test is about.

    Args:
        ask: with a deadline in seconds.
        got_so_far: whether an answer is of a request that did; one that ends as a whole with its deadline did not.

    Raises:
        AssertionError: none did.
    """
    for seconds in DEADLINES:
        try:
            answer = ask(seconds)
        except DeadlineExceeded:
            continue
        if got_so_far(answer):
            return answer
    raise AssertionError(f"even {DEADLINES[-1]} s were not enough")

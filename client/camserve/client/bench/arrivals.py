"""When the requests of an open loop fall due: a Poisson process from a seed, a pure function that never looks at a clock."""

from __future__ import annotations

import random
from collections.abc import Iterator


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Yields the times of arrival, ascending and without end, seconds from the start.

    Args:
        rate: arrivals a second on average.
        seed: the same seed gives the same times.
    """
    chance = random.Random(seed)  # noqa: S311  # No secret.
    time = 0.0
    while True:
        time += chance.expovariate(rate)
        yield time

"""Whether rows that go back to different depths ride together or in passes of their own.

A pass goes as far back as its shallowest tap, for all of its rows. Together they pay the fixed part once; apart, deep taps are
spared the long way back. `planner.py` asks for the split that takes the device the least time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["cheapest_split"]


def cheapest_split(rows: Mapping[int, int], seconds: Callable[[int, int], float]) -> list[tuple[int, ...]]:
    """Splits depths into runs, each a pass, such that all passes together are predicted to take the least time.

    Args:
        rows: how many by depth.
        seconds: predicted of a pass, from the largest of its depths and its number of rows; must not be negative.

    Returns:
        The runs from deep taps (small numbers) to shallow ones; of equal splits that with the fewest passes.
    """
    depths = sorted(rows)
    # best[i]: the cheapest way for the first i depths, as (seconds, passes, start of the last run).
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    for end in range(1, len(depths) + 1):
        choices = []
        count = 0
        for start in range(end - 1, -1, -1):
            count += rows[depths[start]]
            before, passes, _ = best[start]
            choices.append((before + seconds(depths[end - 1], count), passes + 1, start))
        best.append(min(choices))
    runs: list[tuple[int, ...]] = []
    end = len(depths)
    while end:
        start = best[end][2]
        runs.append(tuple(depths[start:end]))
        end = start
    return runs[::-1]

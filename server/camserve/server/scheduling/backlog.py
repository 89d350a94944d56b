"""How much work is inside the door and has not yet run, in seconds of the device.

`queue.py` adds what each request will take when it is let in and takes it off when it has run or left; the door refuses by the
sums, and the gauges show them. What nothing is known of counts as nothing: a guess refuses nobody.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection

from camserve.server.jobs import Lane
from camserve.server.scheduling.planner import Costs
from camserve.server.scheduling.work import BatchKey

__all__ = ["Backlog", "Load"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one request still has to run.

    Attributes:
        lane: where it waits.
        key: whom its pass is shared with; None once that is over.
        depth: of its pass.
        max_rows: of such a pass.
        amplified_seconds: predicted of its amplified work, as far as known.
    """

    lane: Lane
    key: BatchKey | None
    depth: int = 0
    max_rows: int = 1
    amplified_seconds: float = 0.0


class Backlog:
    """Sums of loads."""

    def __init__(self) -> None:
        self._rows: collections.Counter[tuple[Lane, BatchKey, int, int]] = collections.Counter()
        self._amplified: dict[Lane, tuple[int, float]] = {}

    def add(self, load: Load) -> None:
        """A request has this to run."""
        self._change(load, 1)

    def remove(self, load: Load) -> None:
        """It has run, or will never."""
        self._change(load, -1)

    def seconds(self, lanes: Collection[Lane], costs: Costs, *, beside: BatchKey | None = None) -> float:
        """Predicted seconds of all that these lanes have to run, passes being shared as widely as possible.

        Args:
            lanes: which.
            costs: what passes take.
            beside: of passes of this key only full ones have a fixed cost: whoever asks rides with the rest.
        """
        rows: dict[tuple[BatchKey, int], tuple[int, int]] = {}
        for (lane, key, depth, most), count in self._rows.items():
            if lane in lanes:
                rows[key, most] = (
                    rows.get((key, most), (0, 0))[0] + count,
                    max(depth, rows.get((key, most), (0, 0))[1]),
                )
        total = sum(seconds for lane, (_, seconds) in self._amplified.items() if lane in lanes)
        for (key, most), (count, depth) in rows.items():
            line = costs.line(key, depth)
            if line.is_known:
                passes = count // most if key == beside else math.ceil(count / most)
                total += passes * line.fixed + count * line.per_row
        return total

    def _change(self, load: Load, sign: int) -> None:
        if load.key is not None:
            place = (load.lane, load.key, load.depth, load.max_rows)
            self._rows[place] += sign
            if not self._rows[place]:
                del self._rows[place]
        if load.amplified_seconds:
            count, seconds = self._amplified.get(load.lane, (0, 0.0))
            count += sign
            # Sums of floats drift: none left is exactly nothing left.
            self._amplified[load.lane] = (count, max(0.0, seconds + sign * load.amplified_seconds) if count else 0.0)

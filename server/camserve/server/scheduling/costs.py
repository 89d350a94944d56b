"""What a pass will take: a line a·n + b over its rows n, for each batch key and depth, fitted to what passes took.

`queue.py` tells it of every pass and every chunk; the planner cuts and chooses by it, the door admits by it. It forgets, so
that it follows a device that becomes slower or faster; one pass that took much longer than it should hardly moves it, three in
a row do. What was never seen is guessed from its neighbours: the same rows to another depth, rows of another size of the same
model, and in the end a prior that is marked as not known.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import TypeAlias

from camserve.server.scheduling.work import BatchKey, WorkKey

__all__ = ["PRIOR", "CostModel", "Line"]

# Each observation weighs this much less with every later one: the last dozen count.
_FORGETTING = 0.92
# An observation this many times off, where its number of rows was seen before, is an outlier and counts as that many times off.
_SURPRISE = 2.0
# So many outliers in a row, on the same side, are news: of what was before only the shape of the line is kept.
_NEWS = 3
# Weight of the shape of the line so far beside one observation: it decides where only one number of rows was ever seen.
_SHAPE_WEIGHT = 0.2
# Observations after which an estimate may count against a request, and for how long without another one.
_FEWEST_TO_TRUST = 4
_SECONDS_OF_TRUST = 20.0
# A gradient of each further stage, as a share of the forward: only for depths that were not yet seen.
_DEPTH_SHARE = 0.4
# Callers choose shapes and budgets: what has not been used for longest is forgotten.
_MOST_REMEMBERED = 1024
# A chunk of amplified work is meant to take so long.
_CHUNK_SECONDS = 0.02
_SHORTEST_SECONDS = 1e-7

Place: TypeAlias = tuple[BatchKey, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Predicted seconds of a pass.

    Attributes:
        fixed: of any pass, whatever its rows.
        per_row: of each row.
        is_known: from passes of this model, rather than a prior.
    """

    fixed: float
    per_row: float
    is_known: bool = True

    def seconds(self, rows: float) -> float:
        """Of a pass of so many rows."""
        return self.fixed + self.per_row * rows

    def scaled(self, fixed: float, per_row: float) -> Line:
        """The line with both parts multiplied."""
        return Line(self.fixed * fixed, self.per_row * per_row, self.is_known)


PRIOR = Line(0.005, 0.005, is_known=False)
"""Of a pass of which nothing is known."""


class _Fit:
    """One line, by weighted least squares of relative errors with forgetting."""

    def __init__(self, shape: Line) -> None:
        self.line = Line(shape.fixed, shape.per_row)
        self.runs = 0
        self.observed_at = -math.inf
        self._fewest = math.inf
        self._most = 0.0
        self._surprises = 0
        # Weighted sums: of 1, n, n², t and n·t.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def observe(self, rows: float, seconds: float, now: float) -> None:
        seconds = max(seconds, _SHORTEST_SECONDS)
        kept = _FORGETTING
        if self.runs >= 2 and self._fewest <= rows <= self._most:
            predicted = max(self.line.seconds(rows), _SHORTEST_SECONDS)
            side = (seconds > _SURPRISE * predicted) - (seconds < predicted / _SURPRISE)
            self._surprises = (self._surprises if self._surprises * side > 0 else 0) + side
            if abs(self._surprises) >= _NEWS:
                kept, self._surprises = 0.0, 0
            else:
                seconds = min(max(seconds, predicted / _SURPRISE), predicted * _SURPRISE)
        self.runs += 1
        self.observed_at = now
        self._fewest, self._most = min(self._fewest, rows), max(self._most, rows)
        weight = 1 / max(seconds, self.line.seconds(rows) if self.runs > 1 else 0.0) ** 2
        new = (1.0, rows, rows * rows, seconds, rows * seconds)
        self._sums = _joined(self._sums, kept, new, weight)
        self._solve()

    def _solve(self) -> None:
        """Fits the sums together with two points on the line so far, moved to the level of what was observed."""
        ones, n, nn, t, nt = self._sums
        a, b = self.line.per_row, self.line.fixed
        level = (a * nt + b * t) / max(a * a * nn + 2 * a * b * n + b * b * ones, 1e-300)
        sums = self._sums
        for rows in (1.0, max(2.0, self._most, 2 * self._fewest)):
            seconds = max(level * (a * rows + b), _SHORTEST_SECONDS)
            point = (1.0, rows, rows * rows, seconds, rows * seconds)
            sums = _joined(sums, 1.0, point, _SHAPE_WEIGHT / seconds**2)
        ones, n, nn, t, nt = sums
        per_row = (ones * nt - n * t) / (ones * nn - n * n)
        fixed = (t - per_row * n) / ones
        if fixed < 0:
            fixed, per_row = 0.0, nt / nn
        elif per_row < 0:
            fixed, per_row = t / ones, 0.0
        self.line = Line(fixed, per_row)


class CostModel:
    """Learns what passes and amplified work take."""

    def __init__(self) -> None:
        self._fits: collections.OrderedDict[Place, _Fit] = collections.OrderedDict()
        self._places: dict[tuple[str, str], list[Place]] = {}
        self._chunks: collections.OrderedDict[WorkKey, float] = collections.OrderedDict()
        self._wholes: collections.OrderedDict[WorkKey, tuple[float, int, float]] = collections.OrderedDict()

    def observe(self, key: BatchKey, depth: int, rows: int, seconds: float, now: float) -> None:
        """A pass of so many rows, back to the shallowest of their depths, took so long."""
        place = (key, depth)
        fit = self._fits.get(place)
        if fit is None:
            fit = self._fits[place] = _Fit(self.line(key, depth))
            self._places.setdefault((key.model, key.version), []).append(place)
            if len(self._fits) > _MOST_REMEMBERED:
                (old, old_depth), _ = self._fits.popitem(last=False)
                self._places[old.model, old.version].remove((old, old_depth))
        self._fits.move_to_end(place)
        fit.observe(rows, seconds, now)

    def line(self, key: BatchKey, depth: int) -> Line:
        """What passes of that kind are predicted to take; guessed from neighbours, or the prior, where none was seen."""
        fit = self._fits.get((key, depth))
        if fit is not None:
            return fit.line
        places = self._places.get((key.model, key.version))
        if not places:
            return PRIOR
        near_key, near_depth = min(places, key=lambda place: _distance(place, key, depth))
        way = (1 + _DEPTH_SHARE * min(depth, 8)) / (1 + _DEPTH_SHARE * min(near_depth, 8))
        size = max(1, math.prod(key.shape)) / max(1, math.prod(near_key.shape))
        return self._fits[near_key, near_depth].line.scaled(way, way * size)

    def is_trusted(self, key: BatchKey, depth: int, now: float) -> bool:
        """Whether a request may be refused because of what a pass of that kind takes.

        Not on the word of a few passes, nor of old ones: whoever is refused brings no news, so that a slow hour would be
        believed in for ever.
        """
        fit = self._fits.get((key, depth))
        return fit is not None and fit.runs >= _FEWEST_TO_TRUST and now - fit.observed_at <= _SECONDS_OF_TRUST

    def observe_chunk(self, work: WorkKey, seconds: float) -> None:
        """One chunk of amplified work took so long."""
        known = self._chunks.pop(work, None)
        if known is None:
            self._chunks[work] = seconds
            if len(self._chunks) > _MOST_REMEMBERED:
                self._chunks.popitem(last=False)
            return
        counted = min(max(seconds, known / _SURPRISE), known * _SURPRISE)
        self._chunks[work] = known + (counted - known) * 0.3

    def chunk_seconds(self, work: WorkKey) -> float:
        """What the next chunk is predicted to take."""
        return self._chunks.get(work, _CHUNK_SECONDS)

    def observe_whole(self, work: WorkKey, seconds: float, now: float) -> None:
        """Amplified work was done to its end and took so long on the device, all chunks together."""
        known, runs, _ = self._wholes.pop(work, (seconds, 0, now))
        counted = min(max(seconds, known / _SURPRISE), known * _SURPRISE)
        self._wholes[work] = (known + (counted - known) * 0.3, runs + 1, now)
        if len(self._wholes) > _MOST_REMEMBERED:
            self._wholes.popitem(last=False)

    def whole_seconds(self, work: WorkKey) -> float | None:
        """What such work is predicted to take from beginning to end; None if none was ever seen to its end."""
        found = self._wholes.get(work)
        return None if found is None else found[0]

    def is_whole_trusted(self, work: WorkKey, now: float) -> bool:
        """As `is_trusted`, for amplified work."""
        _, runs, observed_at = self._wholes.get(work, (0.0, 0, -math.inf))
        return runs >= _FEWEST_TO_TRUST and now - observed_at <= _SECONDS_OF_TRUST

    def forget(self, model: str, version: str, load_number: int) -> bool:
        """What was loaded so is gone; returns whether nothing is left of that version, not even loaded anew."""
        places = self._places.get((model, version), [])
        for place in [place for place in places if place[0].load_number == load_number]:
            places.remove(place)
            del self._fits[place]
        if places:
            return False
        self._places.pop((model, version), None)
        for remembered in (self._chunks, self._wholes):
            for work in [work for work in remembered if (work.model, work.version) == (model, version)]:
                del remembered[work]
        return True


def _joined(
    sums: tuple[float, float, float, float, float],
    kept: float,
    new: tuple[float, float, float, float, float],
    weight: float,
) -> tuple[float, float, float, float, float]:
    return (
        sums[0] * kept + new[0] * weight,
        sums[1] * kept + new[1] * weight,
        sums[2] * kept + new[2] * weight,
        sums[3] * kept + new[3] * weight,
        sums[4] * kept + new[4] * weight,
    )


def _distance(place: Place, key: BatchKey, depth: int) -> tuple[int, float, int, bool]:
    """Same shape and dtype before all, then the nearest size, then the nearest depth, then the same form."""
    other, other_depth = place
    is_other = (other.shape, other.extra_shapes, other.dtype) != (key.shape, key.extra_shapes, key.dtype)
    size = abs(math.log(max(1, math.prod(other.shape)) / max(1, math.prod(key.shape))))
    return is_other, size, abs(other_depth - depth), other.form != key.form

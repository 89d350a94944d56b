"""What the device does next: a pure function of what waits, what is arriving, who has had how much, what it costs, and the time.

`queue.py` calls `decide` whenever the device is free and something changed. In words, docs/scheduling.md; in short:

1. The lane that has had least of its share is due; within it passes, unless chunks of amplified work lag behind their share;
   within those, callers that have not had more than others before those that have, then the earliest deadline, then arrival.
2. The first of these whose batch need not be waited for is the head. Rows of its key fill the batch: those of its lane, then
   riders of other lanes. Callers that have had far more than the head's lengthen its pass by a slice at most.
3. Rows of different depths ride together, unless apart they take the device clearly less time; the head's part goes.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from camserve.server.jobs import Lane
from camserve.server.scheduling.costs import Line
from camserve.server.scheduling.shares import Charge, Shares
from camserve.server.scheduling.splits import cheapest_split
from camserve.server.scheduling.work import BatchKey, Candidate, WorkKey

__all__ = ["WEIGHTS", "Costs", "Cut", "Decision", "Limits", "decide"]

WEIGHTS: Mapping[Lane, float] = MappingProxyType({Lane.INTERACTIVE: 6.0, Lane.STANDARD: 3.0, Lane.BULK: 1.0})
"""Parts of the device that each lane gets while all of them wait; the defaults."""

# Callers whose use of the device differs by less than this go by deadline: about one chunk.
_EVEN_SECONDS = 0.02
# Passes of a lane go before its chunks while these lag no further than this behind: a burst of cheap requests waits for the chunk
# under way and no other, and only a lasting load of them is held to its share.
_CHUNKS_LAG_SECONDS = 0.25
# Passes apart must be predicted to take no more than this part of one together: estimates scatter, they count rows that want less
# than the deepest as if they wanted its maps as well, and each pass more is one more wait for those behind it.
_CLEARLY_CHEAPER = 0.75
# Who is ahead by more than this part of a full pass has had far more. Among callers that ask alike each pays for few rows of one,
# and for half of the smallest, with two.
_FAR_AHEAD = 0.6
# Who has waited so long goes before those whose caller has had less: a share must not become a wait for ever.
_LONGEST_SECONDS = 60.0
# Of lanes that have had the same, the more urgent goes first.
_URGENCY = {lane: place for place, lane in enumerate(Lane)}


class Costs(Protocol):
    """What the planner asks of the cost model."""

    def line(self, key: BatchKey, depth: int) -> Line:
        """What passes of that key back to that depth take."""

    def chunk_seconds(self, work: WorkKey) -> float:
        """What the next chunk of that work takes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the planner keeps to.

    Attributes:
        weights: part of the device of each lane, while all wait.
        window_seconds: longest that a pass waits for requests that are known or likely to come.
        max_pass_seconds: rows are added to a batch only while it is predicted to take no longer than this.
        slice_seconds: what rows of callers that have had far more may add to the pass of one that has had less.
    """

    weights: Mapping[Lane, float] = dataclasses.field(default_factory=lambda: WEIGHTS)
    window_seconds: float = 0.005
    max_pass_seconds: float = 0.5
    slice_seconds: float = 0.02


class Cut(enum.StrEnum):
    """Why a batch has no more rows."""

    ROWS = "rows"
    """As many as the model takes."""
    SLICE = "slice"
    """More would take the device for longer than one slice."""
    DEADLINE = "deadline"
    """More, or waiting for more, would make a deadline pass."""
    DEPTH = "depth"
    """The others go further or less far back: passes of their own are cheaper."""
    SHARE = "share"
    """The others' lanes have had their share, and somebody else waits."""
    CALLER = "caller"
    """The others' callers have had far more, and would keep one waiting who has had less."""
    WINDOW = "window"
    """Nobody else came within the window."""
    IDLE = "idle"
    """Nobody else was to be expected."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now: run these tickets or, if there are none, ask again at `ask_again_at` or when something changes.

    Attributes:
        tickets: rows of one pass, or the one amplified work whose next chunk is to be done.
        is_chunk: which of the two.
        cut: why the batch has no more rows; None for a chunk.
        predicted_seconds: of the device.
        charges: who pays for it.
        shares: after it, as predicted.
        ask_again_at: monotonic seconds, or infinity.
    """

    shares: Shares
    tickets: tuple[int, ...] = ()
    is_chunk: bool = False
    cut: Cut | None = None
    predicted_seconds: float = 0.0
    charges: tuple[Charge, ...] = ()
    ask_again_at: float = math.inf


def decide(
    waiting: Iterable[Candidate],
    *,
    shares: Shares,
    costs: Costs,
    limits: Limits,
    now: float,
    arriving: Mapping[tuple[str, str], int] = MappingProxyType({}),
    returning: Mapping[tuple[str, str], float] = MappingProxyType({}),
) -> Decision:
    """Decides what the device does next.

    Args:
        waiting: rows and amplified works, any order; expired ones are passed over.
        shares: who has had how much.
        costs: what passes take.
        limits: to keep to.
        now: monotonic seconds.
        arriving: by (model, version), how many requests are past the door and still being decoded.
        returning: by (model, version) of which more requests are likely to come at once, when its last pass ended.
    """
    live = [entry for entry in waiting if entry.deadline > now]
    if not live:
        return Decision(shares=shares)
    return _Desk(live, shares, costs, limits, now).decision(arriving, returning)


class _Desk:
    """One decision: what waits, sorted in several ways."""

    def __init__(self, live: Sequence[Candidate], shares: Shares, costs: Costs, limits: Limits, now: float) -> None:
        self._count = len(live)
        self._shares = shares
        self._costs = costs
        self._limits = limits
        self._now = now
        self._lines: dict[tuple[BatchKey, int], Line] = {}
        self._groups: dict[BatchKey, list[Candidate]] = {}
        self._lanes: dict[Lane, tuple[list[Candidate], list[Candidate]]] = {}
        self._orders: dict[tuple[Lane, bool], list[Candidate]] = {}
        lanes, groups = self._lanes, self._groups
        for entry in live:
            lane = lanes.get(entry.lane)
            if lane is None:
                lane = lanes[entry.lane] = ([], [])
            if entry.work is not None:
                lane[1].append(entry)
                continue
            lane[0].append(entry)
            group = groups.get(entry.key)
            if group is None:
                groups[entry.key] = [entry]
            else:
                group.append(entry)
        self._ask_again_at = math.inf

    def decision(self, arriving: Mapping[tuple[str, str], int], returning: Mapping[tuple[str, str], float]) -> Decision:
        cuts: dict[BatchKey, Cut | None] = {}
        lanes = self._shares.lanes
        for lane in sorted(self._lanes, key=lambda lane: (lanes.standing(lane), _URGENCY[lane])):
            of_class = self._shares.of_class(lane)
            are_chunks_due = of_class.standing(True) + _CHUNKS_LAG_SECONDS < of_class.standing(False)  # noqa: FBT003
            for is_chunk in (True, False) if are_chunks_due else (False, True):
                for entry in self._in_turn(lane, is_chunk=is_chunk):
                    if is_chunk:
                        return self._chunk(entry)
                    if entry.key not in cuts:
                        cuts[entry.key] = self._cut(entry.key, arriving, returning)
                    cut = cuts[entry.key]
                    if cut is not None:
                        return self._batch(entry, cut)
        return Decision(shares=self._shares, ask_again_at=self._ask_again_at)

    def _line(self, key: BatchKey, depth: int) -> Line:
        line = self._lines.get((key, depth))
        if line is None:
            line = self._lines[key, depth] = self._costs.line(key, depth)
        return line

    def _urgency(self, entry: Candidate) -> tuple[bool, float, int]:
        """Sorts those who can still be on time before those who cannot, not even alone and at once; then by deadline, arrival."""
        if entry.work is not None:
            # Works take turns, so that each has something to show; only who has less than half the time of another goes first.
            return False, math.frexp(max(entry.due - self._now, 0.001))[1], entry.ticket
        is_hopeless = False
        if entry.deadline != math.inf:
            line = self._line(entry.key, entry.depth)
            is_hopeless = line.is_known and self._now + line.seconds(1) > entry.deadline
        return is_hopeless, entry.due, entry.ticket

    def _in_turn(self, lane: Lane, *, is_chunk: bool) -> list[Candidate]:
        """The passes or the chunks of a lane in the order in which they are due."""
        order = self._orders.get((lane, is_chunk))
        if order is None:
            entries = self._lanes[lane][is_chunk]
            order = self._orders[lane, is_chunk] = self._ordered(lane, entries) if len(entries) > 1 else entries
        return order

    def _ordered(self, lane: Lane, entries: Sequence[Candidate]) -> list[Candidate]:
        urgencies = sorted((self._urgency(entry), entry) for entry in entries)
        callers = {entry.caller for entries in self._lanes[lane] for entry in entries}
        if len(callers) == 1:
            return [entry for _, entry in urgencies]
        account = self._shares.of_callers(lane)
        standings = {caller: account.standing(caller) for caller in callers}
        least = min(standings.values())
        # Each row of a caller counts on top of those before it, so that one batch, too, is shared out evenly.
        counted = {caller: standing - least for caller, standing in standings.items()}
        places = []
        for place, (urgency, entry) in enumerate(urgencies):
            level = counted[entry.caller]
            counted[entry.caller] = level + self._row_seconds(entry)
            if self._now - entry.enqueued_at > _LONGEST_SECONDS:
                level = 0.0
            places.append((urgency[0], int(level / _EVEN_SECONDS), place))
        places.sort()
        return [urgencies[place][1] for _, _, place in places]

    def _row_seconds(self, entry: Candidate) -> float:
        """What one row adds: its part of a full pass, or a chunk."""
        if entry.work is not None:
            return self._costs.chunk_seconds(entry.work)
        return self._line(entry.key, entry.depth).seconds(entry.max_rows) / entry.max_rows

    def _cut(
        self, key: BatchKey, arriving: Mapping[tuple[str, str], int], returning: Mapping[tuple[str, str], float]
    ) -> Cut | None:
        """Why the batch of a key should not be waited for any longer; None if it should, and until when is noted."""
        group = self._groups[key]
        limits, now = self._limits, self._now
        if len(group) >= group[0].max_rows:
            return Cut.ROWS
        line = self._line(key, max(entry.depth for entry in group))
        predicted = line.seconds(len(group))
        if predicted >= limits.max_pass_seconds and line.is_known:
            return Cut.SLICE
        model = (key.model, key.version)
        until = -math.inf
        if arriving.get(model):
            until = min(entry.enqueued_at for entry in group) + limits.window_seconds
        if model in returning and line.is_known:
            # Another pass for those who are about to come back would cost the fixed part again: no longer than that is waited.
            until = max(until, returning[model] + min(limits.window_seconds, line.fixed))
        if now >= until:
            return Cut.IDLE if math.isinf(until) else Cut.WINDOW
        latest = min(entry.deadline for entry in group) - predicted
        if now >= latest:
            return Cut.DEADLINE
        self._ask_again_at = min(self._ask_again_at, until, latest)
        return None

    def _chunk(self, entry: Candidate) -> Decision:
        seconds = self._row_seconds(entry)
        charges = (Charge(entry.lane, entry.caller, is_chunk=True, part=1.0),)
        return Decision(
            tickets=(entry.ticket,),
            is_chunk=True,
            predicted_seconds=seconds,
            charges=charges,
            shares=self._charged(charges, seconds),
        )

    def _batch(self, head: Candidate, cut: Cut) -> Decision:
        """The batch of that head; `cut` tells why it is not waited for."""
        pool = self._pool(head)
        depths = self._depths(head, pool)
        chosen, depth, left_out = self._filled(head, pool, depths)
        if left_out is Cut.DEADLINE:
            patient = self._delayed(head, pool, depths, len(chosen))
            if patient:
                chosen, depth, left_out = self._filled(patient[0], patient, depths)
        seconds = self._line(head.key, depth).seconds(len(chosen))
        counts = collections.Counter((entry.lane, entry.caller) for entry in chosen)
        charges = tuple(
            Charge(lane, caller, is_chunk=False, part=rows / len(chosen), is_rider=lane is not head.lane)
            for (lane, caller), rows in counts.items()
        )
        return Decision(
            tickets=tuple(entry.ticket for entry in chosen),
            cut=left_out or cut,
            predicted_seconds=seconds,
            charges=charges,
            shares=self._charged(charges, seconds),
        )

    def _delayed(
        self, head: Candidate, pool: Sequence[Candidate], depths: Collection[int], hurried: int
    ) -> Sequence[Candidate]:
        """Who would go in a full pass, where a small one for so many hurried before it would make at least as many of them late.

        Small passes for those about to expire, each followed by the next who are, would leave most of the device unused.
        """
        riding = [entry for entry in pool if entry.depth in depths]
        line = self._line(head.key, max(entry.depth for entry in riding))
        full = line.seconds(min(len(riding), head.max_rows))
        patient = [entry for entry in riding if entry.deadline >= self._now + full]
        behind = self._now + line.seconds(hurried) + full
        late = sum(entry.deadline < behind for entry in patient[: head.max_rows])
        return patient if late >= hurried and patient[0].lane is head.lane else []

    def _filled(
        self, head: Candidate, pool: Sequence[Candidate], depths: Collection[int]
    ) -> tuple[list[Candidate], int, Cut | None]:
        """Those of a pool that ride with a head, how far back they go, and why no more do."""
        key, most = head.key, head.max_rows
        crowd = self._crowd(head, pool)
        owed = 0
        chosen: list[Candidate] = []
        parts: dict[Lane, int] = collections.Counter()
        depth, tightest = 0, math.inf
        left_out: Cut | None = None
        row_seconds = self._row_seconds(head)
        for entry in pool:
            if len(chosen) == most:
                left_out = Cut.ROWS
                break
            if entry.depth not in depths:
                left_out = left_out or Cut.DEPTH
                continue
            if entry.lane is not head.lane and not self._may_ride(
                entry.lane, head, (parts[entry.lane] + 1) * row_seconds
            ):
                left_out = left_out or Cut.SHARE
                continue
            deepest = max(depth, entry.depth)
            line = self._line(key, deepest)
            seconds = line.seconds(len(chosen) + 1)
            if chosen and line.is_known and seconds > self._limits.max_pass_seconds:
                left_out = Cut.SLICE
                break
            if chosen and self._now + seconds > tightest:
                left_out = Cut.DEADLINE
                break
            if entry.caller not in crowd:
                owed += 1
            elif seconds > line.seconds(owed) + self._limits.slice_seconds:
                left_out = left_out or Cut.CALLER
                continue
            chosen.append(entry)
            parts[entry.lane] += 1
            depth = deepest
            if self._now + seconds <= entry.deadline:
                tightest = min(tightest, entry.deadline)
        return chosen, depth, left_out

    def _crowd(self, head: Candidate, pool: Sequence[Candidate]) -> Collection[str]:
        """Callers that have had far more than the head's: theirs is the next pass."""
        line = self._line(head.key, max(entry.depth for entry in pool))
        if not line.is_known:
            return ()
        account = self._shares.of_callers(head.lane)
        ahead = account.standing(head.caller) + _FAR_AHEAD * line.seconds(head.max_rows)
        return {caller for caller in {entry.caller for entry in pool} if account.standing(caller) > ahead}

    def _pool(self, head: Candidate) -> list[Candidate]:
        """All that could ride with a head, itself first: its lane in turn, then riders by deadline."""
        group = self._groups[head.key]
        if len(self._lanes) == 1 and len(self._groups) == 1:
            return self._in_turn(head.lane, is_chunk=False)
        own = [entry for entry in self._in_turn(head.lane, is_chunk=False) if entry.key == head.key]
        riders = [entry for entry in group if entry.lane is not head.lane]
        return own + sorted(riders, key=self._urgency)

    def _depths(self, head: Candidate, pool: Collection[Candidate]) -> Collection[int]:
        """Which depths ride with the head: all, unless passes apart are clearly cheaper for all that waits."""
        rows = collections.Counter(entry.depth for entry in pool)
        if len(rows) == 1:
            return rows

        def seconds(depth: int, count: int) -> float:
            line = self._line(head.key, depth)
            return line.fixed * math.ceil(count / head.max_rows) + line.per_row * count

        runs = cheapest_split(rows, seconds)
        apart = sum(seconds(run[-1], sum(rows[depth] for depth in run)) for run in runs)
        if apart > _CLEARLY_CHEAPER * seconds(max(rows), len(pool)):
            return rows
        run = next(run for run in runs if head.depth in run)
        # Depths that are not in the pool, but between those of the run, cost it nothing.
        return range(run[0], run[-1] + 1)

    def _may_ride(self, lane: Lane, head: Candidate, seconds: float) -> bool:
        """Whether a lane that is not at its turn may fill free rows: nobody else waits, or it has not had much more than due."""
        if self._count == len(self._groups[head.key]):
            return True
        lanes, weights = self._shares.lanes, self._limits.weights
        ahead = lanes.standing(lane) + seconds / weights[lane] - lanes.standing(head.lane)
        return ahead <= self._limits.max_pass_seconds / weights[lane]

    def _charged(self, charges: Sequence[Charge], seconds: float) -> Shares:
        present = {
            lane: (
                [bool(place) for place, entries in enumerate(both) if entries],
                {entry.caller for entries in both for entry in entries},
            )
            for lane, both in self._lanes.items()
        }
        limits = self._limits
        return self._shares.charged(
            charges, seconds, limits.weights, present=present, rider_seconds=limits.max_pass_seconds
        )

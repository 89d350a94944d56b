"""What waits for the device: decoded requests, and amplified work between its chunks.

`pipeline.py` puts requests in and takes those out whose callers left, on the event loop; the runner takes what the planner chose,
tells what it took, and puts amplified work back, on the device thread, so that one pass follows the other without a way over the
event loop. One lock makes the two take turns; both hold it for microseconds.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence

from camserve.server.demand import Demand
from camserve.server.jobs import Job, Lane, Sample
from camserve.server.models.repository import ServedModel
from camserve.server.replies import Reply
from camserve.server.scheduling import (
    Backlog,
    BatchKey,
    Candidate,
    CostModel,
    Decision,
    Forecast,
    Limits,
    Load,
    Returns,
    Shares,
    WorkKey,
    decide,
)
from camserve.server.scheduling.work import PATIENCE_SECONDS
from camserve.server.tracing import UNTRACED, RequestTrace

__all__ = ["DeviceQueue", "Entry", "Turn"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """A decoded request and the way back to its caller.

    Attributes:
        job: with its targets placed.
        model: that is to run.
        sample: its input.
        reply: where outcomes go.
        demand: what it asks of the device.
        waiting: as the planner saw it.
        trace: where its passes are told.
    """

    job: Job
    model: ServedModel
    sample: Sample
    reply: Reply
    demand: Demand
    waiting: Candidate
    trace: RequestTrace = UNTRACED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the device is to do now.

    Attributes:
        entries: the rows of a pass, or the one whose amplified work goes on; none when nothing is to be done.
        decision: of the planner.
        gone: entries whose amplified work waited and was given up, since nobody waits for it any more.
    """

    entries: Sequence[Entry]
    decision: Decision
    gone: Sequence[Entry] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """One that waits: as the planner sees it, whose it is, and what it counts for."""

    candidate: Candidate
    entry: Entry
    load: Load


class DeviceQueue:
    """Decoded requests and amplified work, how many more requests are being decoded, and what is known of costs and shares.

    Args:
        limits: of the planner.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._places: dict[int, _Place] = {}
        self._works: dict[Entry, int] = {}
        self._gone: list[Entry] = []
        self._arriving: collections.Counter[tuple[str, str]] = collections.Counter()
        self._tickets = itertools.count()
        self._costs = CostModel()
        self._shares = Shares()
        self._returns = Returns(limits.window_seconds)
        self._backlog = Backlog()
        self._seeded: set[tuple[BatchKey, int]] = set()
        self._free_at = -math.inf
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return sum(self.depth(lane) for lane in Lane)

    def depth(self, lane: Lane) -> int:
        """Decoded requests of a lane that wait for their pass."""
        with self._lock:
            return sum(self._is_row_of(place, lane) for place in self._places.values())

    def oldest_wait(self, lane: Lane, clock: Callable[[], float]) -> float:
        """Seconds that the oldest of them has waited by a monotonic clock; 0 when there is none."""
        with self._lock:
            times = [place.candidate.enqueued_at for place in self._places.values() if self._is_row_of(place, lane)]
        return max(0.0, clock() - min(times)) if times else 0.0

    def queued_seconds(self, lane: Lane) -> float:
        """Predicted device time of all that a lane has past the door and not yet run, as far as anything is known of it."""
        with self._lock:
            return self._backlog.seconds((lane,), self._costs)

    def forecast(self, demand: Demand, now: float) -> Forecast:
        """What a request would find if it were let in now; takes microseconds."""
        lane, weights = demand.job.lane, self._limits.weights
        above = _BY_URGENCY[: _BY_URGENCY.index(lane)]
        with self._lock:
            self._seed(demand)
            running = max(0.0, self._free_at - now)
            higher = self._backlog.seconds(above, self._costs)
            beside = self._backlog.seconds((lane,), self._costs)
            own = self._own_seconds(demand, now)
            ahead = running
            if math.isfinite(demand.deadline) and beside:
                due = min(demand.deadline, now + PATIENCE_SECONDS[lane])
                dues = [place.candidate.due for place in self._places.values() if place.candidate.lane is lane]
                share = sum(other <= due for other in dues) / len(dues) if dues else 0.0
                first = share * self._backlog.seconds((lane,), self._costs, beside=demand.key)
                ahead += first + min(higher, first * sum(weights[other] for other in above) / weights[lane])
        return Forecast(queued_seconds=running + higher + beside, own_seconds=own, ahead_seconds=ahead)

    @contextlib.contextmanager
    def announced(self, demand: Demand) -> Iterator[None]:
        """Tells the planner, for the length of a `with` block, that a request is being decoded."""
        key = (demand.key.model, demand.key.version)
        with self._lock:
            self._seed(demand)
            load = self._load(demand)
            self._backlog.add(load)
            self._arriving[key] += 1
            self._returns.came(key, asyncio.get_running_loop().time())
        try:
            yield
        finally:
            with self._lock:
                self._backlog.remove(load)
                self._arriving[key] -= 1
            self._changed.set()

    def put(
        self,
        demand: Demand,
        job: Job,
        sample: Sample,
        reply: Reply,
        now: float,
        trace: RequestTrace = UNTRACED,
    ) -> Entry:
        """Adds a decoded request.

        Args:
            demand: what it asks of the device.
            job: with its targets placed.
            sample: its input.
            reply: where outcomes go.
            now: monotonic seconds.
            trace: where its passes are told.
        """
        key = dataclasses.replace(
            demand.key,
            shape=sample.tensor.shape,
            dtype=str(sample.tensor.dtype),
            extra_shapes=tuple(values.shape for values in sample.extras.values()),
        )
        with self._lock:
            candidate = Candidate(
                ticket=next(self._tickets),
                key=key,
                depth=demand.depth,
                max_rows=demand.model.card.max_batch_rows,
                lane=job.lane,
                caller=demand.caller,
                enqueued_at=now,
                deadline=demand.deadline,
            )
            entry = Entry(
                job=job,
                model=demand.model,
                sample=sample,
                reply=reply,
                demand=demand,
                waiting=candidate,
                trace=trace,
            )
            self._add(_Place(candidate, entry, dataclasses.replace(self._load(demand), key=key)))
        self._changed.set()
        return entry

    def drop(self, entry: Entry) -> bool:
        """Takes an entry out if it still waits, because its caller left; says whether it waited for its pass."""
        with self._lock:
            ticket = self._works.pop(entry, None)
            if ticket is not None:
                self._take(ticket)
                self._gone.append(entry)
            waited = self._take(entry.waiting.ticket) is not None
        self._changed.set()
        return waited

    def listen(self) -> None:
        """From now on `changed` waits for what has not happened yet."""
        self._changed.clear()

    async def changed(self, until: float) -> None:
        """Returns when something came, left or failed to come since `listen`, or at a moment of monotonic seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(None if math.isinf(until) else until):
                await self._changed.wait()

    def take(self, now: float) -> Turn:
        """Takes out what the device is to do now; device thread."""
        with self._lock:
            gone = self._gone + self._expired_works(now)
            self._gone = []
            decision = decide(
                [place.candidate for place in self._places.values()],
                shares=self._shares,
                costs=self._costs,
                limits=self._limits,
                now=now,
                arriving=self._arriving,
                returning=self._returns.expected_since(now, self._arriving),
            )
            self._shares = decision.shares
            self._free_at = now + decision.predicted_seconds
            places = [self._places[ticket] for ticket in decision.tickets]
            for place in places:
                self._take(place.candidate.ticket)
                self._works.pop(place.entry, None)
        return Turn(entries=[place.entry for place in places], decision=decision, gone=gone)

    def observe_pass(self, entries: Sequence[Entry], depth: int, seconds: float, now: float) -> None:
        """A pass of these rows took so long; device thread.

        Args:
            entries: that ran.
            depth: how far back its gradients went: no further than the deepest of them waits for.
            seconds: of the device.
            now: monotonic seconds.
        """
        with self._lock:
            self._costs.observe(entries[0].waiting.key, depth, len(entries), seconds, now)

    def observe_whole(self, work: WorkKey, seconds: float, now: float) -> None:
        """Amplified work was done to its end, in so much device time; device thread."""
        with self._lock:
            self._costs.observe_whole(work, seconds, now)

    def end(self, turn: Turn, seconds: float, now: float) -> None:
        """What was taken has run: lanes and callers pay what it really took; device thread."""
        decision = turn.decision
        first = turn.entries[0]
        with self._lock:
            self._shares = self._shares.charged(
                decision.charges, seconds - decision.predicted_seconds, self._limits.weights
            )
            if not decision.is_chunk:
                self._returns.ended((first.job.model, first.job.version), len(turn.entries), now)

    def put_back(self, entry: Entry, works: Sequence[WorkKey], spent: float, chunk_seconds: float, now: float) -> None:
        """Amplified work waits for its next chunk, at the end of the line; device thread.

        Args:
            entry: whose.
            works: those of its specs that are not yet done; the first is at work.
            spent: seconds of the device on the first so far.
            chunk_seconds: what its last chunk took, or 0 before the first.
            now: monotonic seconds.
        """
        with self._lock:
            if entry.reply.is_abandoned:
                self._gone.append(entry)
                return
            if chunk_seconds:
                self._costs.observe_chunk(works[0], chunk_seconds)
            first, *rest = ((self._costs.whole_seconds(work) or 0.0) for work in works)
            left = max(first - spent, self._costs.chunk_seconds(works[0])) + sum(rest)
            candidate = dataclasses.replace(entry.waiting, ticket=next(self._tickets), enqueued_at=now, work=works[0])
            self._works[entry] = candidate.ticket
            self._add(_Place(candidate, entry, Load(lane=candidate.lane, key=None, amplified_seconds=left)))

    def forget(self, model: str, version: str, load_number: int) -> None:
        """A model that was loaded is gone, and nobody is inside it: what was learnt of it goes as well."""
        with self._lock:
            self._seeded = {
                place
                for place in self._seeded
                if (place[0].model, place[0].version, place[0].load_number) != (model, version, load_number)
            }
            if self._costs.forget(model, version, load_number):
                self._returns.forget((model, version))
                self._arriving.pop((model, version), None)

    def _load(self, demand: Demand) -> Load:
        # What a rule may ask for counts once it has asked; a rule that one part in a hundred meets must not fill the door.
        works = (work for index, work in demand.works.items() if index not in demand.maybe)
        known = (self._costs.whole_seconds(work) for work in works)
        return Load(
            lane=demand.job.lane,
            key=demand.key,
            depth=demand.depth,
            max_rows=demand.model.card.max_batch_rows,
            amplified_seconds=sum(seconds for seconds in known if seconds is not None),
        )

    def _own_seconds(self, demand: Demand, now: float) -> float:
        """What the request takes alone, as far as anybody may be refused by it."""
        costs, own = self._costs, 0.0
        if costs.is_trusted(demand.key, demand.asked_depth, now):
            own += costs.line(demand.key, demand.asked_depth).seconds(1)
        # Nobody is refused for what a rule adds.
        for spec in demand.job.asked:
            work = demand.works.get(spec.index)
            # Who takes the best map so far can be served in any time.
            if work is not None and not spec.parameters.allows_partial and costs.is_whole_trusted(work, now):
                own += costs.whole_seconds(work) or 0.0
        return own

    def _seed(self, demand: Demand) -> None:
        """What passes took at warm-up is where the estimates of a key begin."""
        place = (demand.key, id(demand.model))
        if place not in self._seeded and len(self._seeded) < _MOST_SEEDED:
            self._seeded.add(place)
            for sample in demand.model.costs:
                self._costs.observe(demand.key, sample.depth, sample.rows, sample.seconds, -math.inf)

    def _add(self, place: _Place) -> None:
        self._places[place.candidate.ticket] = place
        self._backlog.add(place.load)

    def _take(self, ticket: int) -> _Place | None:
        place = self._places.pop(ticket, None)
        if place is not None:
            self._backlog.remove(place.load)
        return place

    def _expired_works(self, now: float) -> list[Entry]:
        """Takes amplified work out whose time is over; rows are taken out by their callers, who are told at their deadline."""
        over = [entry for entry, ticket in self._works.items() if self._places[ticket].candidate.deadline <= now]
        for entry in over:
            self._take(self._works.pop(entry))
        return over

    @staticmethod
    def _is_row_of(place: _Place, lane: Lane) -> bool:
        return place.candidate.work is None and place.candidate.lane is lane


_BY_URGENCY = tuple(Lane)
# Keys come from cards: a handful for each model.
_MOST_SEEDED = 4096

"""A device with a clock that jumps: runs a workload through the planner as `queue.py` and the runner do in real time."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from camserve.server.jobs import Lane
from camserve.server.scheduling.costs import Line
from camserve.server.scheduling.planner import Decision, Limits, decide
from camserve.server.scheduling.returns import Returns
from camserve.server.scheduling.shares import Shares
from camserve.server.scheduling.work import BatchKey, Candidate, WorkKey

__all__ = ["KEY", "OTHER_KEY", "FixedCosts", "Ran", "Request", "Simulation", "candidate"]

KEY = BatchKey(model="a", version="1", shape=(3, 32, 32))
OTHER_KEY = BatchKey(model="b", version="1", shape=(3, 32, 32))


@dataclasses.dataclass(frozen=True)
class FixedCosts:
    """Costs that are what they are: a line for each depth, and one for all chunks."""

    lines: Mapping[int, Line]
    chunk: float = 0.02

    @classmethod
    def of(cls, fixed: float, per_row: float, steeper: float = 0.0, chunk: float = 0.02) -> FixedCosts:
        """Lines for depths 0 to 9; each further depth adds a share to the whole."""
        return cls(
            {depth: Line(fixed * (1 + steeper * depth), per_row * (1 + steeper * depth)) for depth in range(10)}, chunk
        )

    def line(self, _key: BatchKey, depth: int) -> Line:
        """Whatever the key."""
        return self.lines[depth]

    def chunk_seconds(self, _work: WorkKey) -> float:
        """Whatever the work."""
        return self.chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request of a workload.

    Attributes:
        announced_at: when it came through the door.
        decode_seconds: until it was put.
        chunks: of amplified work, after its pass.
        is_only_chunks: there was no pass before them.
        repeats: how often its caller asks again, each time so many seconds after the answer as `think_seconds` tells in turn.
    """

    announced_at: float = 0.0
    decode_seconds: float = 0.0
    key: BatchKey = KEY
    depth: int = 1
    max_rows: int = 4
    lane: Lane = Lane.STANDARD
    caller: str = ""
    patience: float = math.inf
    chunks: int = 0
    is_only_chunks: bool = False
    repeats: int = 0
    think_seconds: tuple[float, ...] = (0.0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """One pass or chunk."""

    requests: tuple[Request, ...]
    candidates: tuple[Candidate, ...]
    started_at: float
    ended_at: float
    decision: Decision


def candidate(ticket: int, **changes: object) -> Candidate:
    """One that waits since 0."""
    given: dict[str, object] = {"key": KEY, "max_rows": 4, "enqueued_at": 0.0, "depth": 1, **changes}
    return Candidate(ticket=ticket, **given)


@dataclasses.dataclass
class Simulation:
    """Runs until nothing is left, or until a moment.

    Attributes:
        costs: what the planner believes.
        truth: what a pass of (candidates) really takes; what is believed, unless told.
    """

    costs: FixedCosts
    limits: Limits = dataclasses.field(default_factory=Limits)
    truth: Callable[[Sequence[Candidate], float], float] = lambda _candidates, predicted: predicted
    shares: Shares = dataclasses.field(default_factory=Shares)
    ran: list[Ran] = dataclasses.field(default_factory=list)
    idle: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    expired: list[Candidate] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._now = 0.0
        self._tickets = 0
        self._to_come: list[Request] = []
        self._announced: list[Request] = []
        self._waiting: dict[int, tuple[Candidate, Request, int]] = {}
        self._returns = Returns(self.limits.window_seconds)

    def run(self, requests: Sequence[Request], until: float = math.inf) -> list[Ran]:
        """Returns what ran, in order."""
        for request in requests:
            self._announce(request)
        while (self._to_come or self._waiting) and self._now < until:
            decided = self._decision()
            self.shares = decided.shares
            if decided.tickets:
                self._turn(decided)
            else:
                self._wait(decided)
        return self.ran

    def _announce(self, request: Request) -> None:
        bisect.insort(self._announced, request, key=lambda request: request.announced_at)
        bisect.insort(self._to_come, request, key=lambda request: request.announced_at + request.decode_seconds)

    def _put(self, entry: Candidate, request: Request, chunks: int) -> None:
        self._waiting[entry.ticket] = (entry, request, chunks)
        self._tickets += 1

    def _decision(self) -> Decision:
        """What the planner says of what has come by now."""
        now = self._now
        while self._announced and self._announced[0].announced_at <= now:
            first = self._announced.pop(0)
            self._returns.came((first.key.model, first.key.version), now)
        while self._to_come and self._to_come[0].announced_at + self._to_come[0].decode_seconds <= now:
            request = self._to_come.pop(0)
            self._put(self._candidate(self._tickets, request), request, request.chunks)
        for ticket in [ticket for ticket, (entry, _, _) in self._waiting.items() if entry.deadline <= now]:
            self.expired.append(self._waiting.pop(ticket)[0])
        arriving = collections.Counter(
            (request.key.model, request.key.version) for request in self._to_come if request.announced_at <= now
        )
        return decide(
            [entry for entry, _, _ in self._waiting.values()],
            shares=self.shares,
            costs=self.costs,
            limits=self.limits,
            now=now,
            arriving=arriving,
            returning=self._returns.expected_since(now, arriving),
        )

    def _wait(self, decided: Decision) -> None:
        """Lets the clock jump to the next event."""
        coming = self._to_come[0] if self._to_come else None
        next_come = coming.announced_at + coming.decode_seconds if coming else math.inf
        expires = min((entry.deadline for entry, _, _ in self._waiting.values()), default=math.inf)
        then = min(decided.ask_again_at, next_come, expires)
        assert then > self._now, "the planner waits for what has been"
        assert then < math.inf or not self._waiting, "the planner waits for nothing"
        if self._waiting:
            self.idle.append((self._now, then))
        self._now = then

    def _turn(self, decided: Decision) -> None:
        """Runs one pass or chunk."""
        chosen = [self._waiting.pop(ticket) for ticket in decided.tickets]
        candidates = tuple(entry for entry, _, _ in chosen)
        seconds = self.truth(candidates, decided.predicted_seconds)
        self.shares = self.shares.charged(decided.charges, seconds - decided.predicted_seconds, self.limits.weights)
        started_at, self._now = self._now, self._now + seconds
        self.ran.append(
            Ran(
                requests=tuple(request for _, request, _ in chosen),
                candidates=candidates,
                started_at=started_at,
                ended_at=self._now,
                decision=decided,
            )
        )
        if not decided.is_chunk:
            self._returns.ended((candidates[0].key.model, candidates[0].key.version), len(candidates), self._now)
        for entry, request, chunks in chosen:
            if request.repeats:
                pause = request.think_seconds[request.repeats % len(request.think_seconds)]
                self._announce(
                    dataclasses.replace(request, announced_at=self._now + pause, repeats=request.repeats - 1)
                )
            if left := chunks - (entry.work is not None):
                work = WorkKey(model=request.key.model, version="1", method="score-cam")
                rest = dataclasses.replace(entry, ticket=self._tickets, work=work, enqueued_at=self._now)
                self._put(rest, request, left)

    @staticmethod
    def _candidate(ticket: int, request: Request) -> Candidate:
        enqueued_at = request.announced_at + request.decode_seconds
        return Candidate(
            ticket=ticket,
            key=request.key,
            depth=request.depth,
            max_rows=request.max_rows,
            lane=request.lane,
            caller=request.caller,
            enqueued_at=enqueued_at,
            deadline=request.announced_at + request.patience,
            work=WorkKey(model=request.key.model, version="1", method="score-cam") if request.is_only_chunks else None,
        )

    def seconds_by(self, name: str, until: float = math.inf) -> dict[object, float]:
        """Device-seconds by an attribute of candidates, of what had ended by then; a pass counts by rows."""
        found: dict[object, float] = {}
        for ran in self.ran:
            if ran.ended_at <= until:
                for entry in ran.candidates:
                    who = getattr(entry, name)
                    found[who] = found.get(who, 0.0) + (ran.ended_at - ran.started_at) / len(ran.candidates)
        return found

"""The device thread: takes one pass or chunk after another from the queue, sends predictions before any gradient, maps at once.

`dispatch.py` sets it to work; outcomes go to each entry's reply. A batch that fails is halved until the row at fault stands
alone: out of memory gets smaller passes, a bad row fails by itself and its neighbours are answered. Specs that need many passes
over their row go back to the queue as amplified work, which waits there for its next chunk like anything else.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import structlog
import torch

from camserve.server.engine.effort import effort_of
from camserve.server.engine.passes import Amplification, Closed, Forwarded, Mapped, run_pass
from camserve.server.errors import CamserveError
from camserve.server.failures import contained, not_finite, row_failure
from camserve.server.heartbeat import Heartbeat
from camserve.server.jobs import PassFacts, Reading, Spec, SpecFailed
from camserve.server.last_call import last_call_seconds
from camserve.server.metrics import Metrics
from camserve.server.queue import DeviceQueue, Entry, Turn
from camserve.server.replies import Outcome, Reply, RowForwarded, deliver
from camserve.server.rules import Standing
from camserve.server.tracing import PassTrace, Tracer

__all__ = ["Runner"]

_T = TypeVar("_T")

_log = structlog.get_logger("camserve.runner")


@dataclasses.dataclass(slots=True, kw_only=True)
class _Amplified:
    """A request whose pass is over and whose amplified specs are still at work; owned by the device thread.

    Attributes:
        entry: whose.
        facts: of the pass.
        works: of each spec, in order; the first is at work.
        turned_at: monotonic seconds at which its last turn began; None before the first.
        spent: seconds of the device on the first so far.
    """

    entry: Entry
    facts: PassFacts
    works: collections.deque[Amplification]
    turned_at: float | None = None
    spent: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Rows to run together.

    Attributes:
        entries: whose.
        hindrance: why the pass of the one row there is must do without what its rules add; None in a first attempt.
    """

    entries: list[Entry]
    hindrance: CamserveError | None = None

    @property
    def specs(self) -> list[tuple[Spec, ...]]:
        """Of each row."""
        return [entry.job.specs if self.hindrance is None else entry.job.asked for entry in self.entries]

    @property
    def wanted(self) -> _Batch:
        """What is left of it without those whose callers left."""
        return dataclasses.replace(self, entries=[entry for entry in self.entries if not entry.reply.is_abandoned])


class _Due:
    """Which specs of a pass turned out to be wanted: those of rules only where their conditions hold.

    Args:
        batch: of the pass.
    """

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch
        self._left_out: dict[int, set[int]] = collections.defaultdict(set)

    def __call__(self, row: int, spec_index: int, reading: Reading) -> bool:
        """As `passes.IsDue`."""
        use = self._batch.entries[row].job.rule_of(spec_index)
        if use is None or use.is_due(reading):
            return True
        self._left_out[row].add(spec_index)
        return False

    @property
    def depth(self) -> int:
        """How far back the gradients went that were taken."""
        return max(self._depth(row, entry) for row, entry in enumerate(self._batch.entries))

    def _depth(self, row: int, entry: Entry) -> int:
        if row not in self._left_out:
            return entry.waiting.depth
        made = [spec for spec in self._batch.specs[row] if spec.index not in self._left_out[row]]
        return effort_of(entry.model.pass_model, made).depth


class Runner:
    """Owns the device thread. Everything that touches a program runs there."""

    def __init__(self, metrics: Metrics, torch_threads: int, heartbeat: Heartbeat, tracer: Tracer) -> None:
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._tracer = tracer
        self._amplified: dict[Entry, _Amplified] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="camserve-device")
        # Both are written by the event loop and read by the device thread between two turns.
        self._calls = 0
        self._is_closing = False
        if torch_threads:
            torch.set_num_threads(torch_threads)

    async def call(self, work: Callable[[], _T], *, is_timed: bool = True) -> _T:
        """Runs something else on the device thread, such as loading a model; whatever it raises comes as an Exception.

        Args:
            work: takes no arguments.
            is_timed: False for what may take as long as it likes without anybody thinking that it hangs.
        """

        def call() -> _T:
            with self._heartbeat.during("call", is_timed=is_timed):
                return contained(work)

        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        finally:
            self._calls -= 1

    async def work(self, queue: DeviceQueue) -> float:
        """Runs what the queue gives, one after another, until it gives nothing or `call` wants the thread.

        Never raises for a row's sake.

        Returns:
            When to come again, monotonic seconds; infinity for when the queue has changed.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._work, queue, loop)

    @property
    def has_amplified(self) -> bool:
        """Whether amplified work is left."""
        return bool(self._amplified)

    async def close(self, timeout_seconds: float) -> bool:
        """Ends the thread after what it is at; says whether it came to an end in time."""
        self._is_closing = True
        idle = asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)
        done, _ = await asyncio.wait({idle}, timeout=timeout_seconds)
        self._thread.shutdown(wait=bool(done), cancel_futures=True)
        return bool(done)

    def _work(self, queue: DeviceQueue, loop: asyncio.AbstractEventLoop) -> float:
        while not self._is_closing:
            turn = queue.take(time.monotonic())
            for entry in turn.gone:
                self._amplified.pop(entry, None)
            if not turn.entries:
                return turn.decision.ask_again_at
            started = time.perf_counter()
            if turn.decision.is_chunk:
                self._advance(queue, turn.entries[0], loop)
            else:
                self._run(queue, turn.entries, loop)
            seconds = time.perf_counter() - started
            queue.end(turn, seconds, time.monotonic())
            self._count(turn, seconds)
            if self._calls:
                break
        return -math.inf

    def _count(self, turn: Turn, seconds: float) -> None:
        metrics = self._metrics
        metrics.device_busy.inc(seconds)
        for charge in turn.decision.charges:
            metrics.device_seconds.labels(charge.lane).inc(charge.part * seconds)
        if turn.decision.cut is not None:
            metrics.batch_cut.labels(turn.decision.cut).inc()

    def _run(self, queue: DeviceQueue, entries: Sequence[Entry], loop: asyncio.AbstractEventLoop) -> None:
        todo = [_Batch(entries=list(entries))]
        while todo:
            batch = todo.pop().wanted
            if not batch.entries:
                continue
            started = time.perf_counter()
            due = _Due(batch)
            try:
                amplified = self._watched_pass(batch, due, loop)
            except BaseException as error:  # noqa: BLE001 - a served model is foreign code and may even call sys.exit
                todo += self._after_failure(batch, error, loop)
                continue
            now = time.monotonic()
            if not any(entry.reply.is_abandoned for entry in batch.entries):
                # What was cut short would make the next look cheaper than it is.
                queue.observe_pass(batch.entries, due.depth, time.perf_counter() - started, now)
            for work in amplified:
                self._amplified[work.entry] = work
                self._put_back(queue, work, 0.0)

    @staticmethod
    def _after_failure(batch: _Batch, error: BaseException, loop: asyncio.AbstractEventLoop) -> list[_Batch]:
        """What is tried next; a row that fails even alone, and without what its rules add, is told so."""
        entries, first = batch.entries, batch.entries[0]
        model = first.job.model
        if len(entries) > 1:
            _log.warning("pass failed, halving", rows=len(entries), model=model, error=repr(error))
            middle = len(entries) // 2
            return [_Batch(entries=entries[middle:]), _Batch(entries=entries[:middle])]
        failure = row_failure(error, model)
        if batch.hindrance is None and len(first.job.asked) < len(first.job.specs):
            _log.warning(
                "row failed, without its rules", request_id=first.job.request_id, model=model, error=repr(error)
            )
            return [_Batch(entries=entries, hindrance=failure)]
        _log.warning("row failed", request_id=first.job.request_id, model=model, error=repr(error))
        deliver(loop, [(first.reply, failure)])
        return []

    def _watched_pass(self, batch: _Batch, due: _Due, loop: asyncio.AbstractEventLoop) -> list[_Amplified]:
        """Runs one batch in sight of the watchdog and of whoever traces; returns the work that goes on behind it."""
        entries = batch.entries
        card = entries[0].model.card
        members = [entry.trace for entry in entries]
        with (
            self._heartbeat.during("pass", card.name, _request_ids(entries)),
            self._tracer.shared_pass(members, card.name, card.version) as trace,
        ):
            return self._pass(batch, due, loop, trace)

    def _pass(self, ran: _Batch, due: _Due, loop: asyncio.AbstractEventLoop, trace: PassTrace) -> list[_Amplified]:
        """Runs one batch; returns the work that goes on behind it."""
        batch = ran.entries
        model = batch[0].model
        card = model.card
        started_at = time.monotonic()
        rows = max(len(batch), card.static_batch_rows or 0)
        inputs = torch.from_numpy(_stacked([entry.sample.tensor for entry in batch], rows))
        extras = [
            torch.from_numpy(_stacked([entry.sample.extras[extra.name] for entry in batch], rows))
            for extra in card.extra_inputs
        ]
        specs = ran.specs + [()] * (rows - len(batch))
        amplified: dict[int, collections.deque[Amplification]] = collections.defaultdict(collections.deque)
        behind: list[_Amplified] = []

        def is_wanted(row: int) -> bool:
            return row < len(batch) and not batch[row].reply.is_abandoned

        def facts_of(explanations: int, event: Forwarded | Closed, backward_seconds: float) -> PassFacts:
            return PassFacts(
                rows=rows,
                explanations=explanations,
                device=card.device,
                dtype=card.dtype,
                plan="compiled" if event.is_compiled else "tapped" if any(specs) else "forward",
                forward_seconds=event.forward_seconds,
                backward_seconds=backward_seconds,
            )

        for event in run_pass(model.pass_model, inputs, specs, extras=extras, is_wanted=is_wanted, is_due=due):
            match event:
                case Forwarded():
                    facts = facts_of(sum(map(len, specs)), event, 0.0)
                    deliver(loop, _forwarded(event, ran, started_at, facts))
                case Mapped():
                    deliver(loop, [(batch[event.row].reply, event.result)])
                    trace.mapped(batch[event.row].job, event.result)
                case Amplification():
                    amplified[event.row].append(event)
                case Closed():
                    facts = facts_of(event.explanations, event, event.backward_seconds)
                    self._observe(facts, event, card.name, card.version)
                    trace.closed(facts, event.map_seconds, due.depth)
                    done = [entry for row, entry in enumerate(batch) if row not in amplified]
                    deliver(loop, [(entry.reply, facts) for entry in done])
                    behind = [
                        _Amplified(entry=batch[row], facts=facts, works=works) for row, works in amplified.items()
                    ]
        return behind

    def _advance(self, queue: DeviceQueue, entry: Entry, loop: asyncio.AbstractEventLoop) -> None:
        """One chunk of an entry's work, which then waits for its next turn."""
        amplified = self._amplified[entry]
        work = amplified.works[0]
        if entry.reply.is_abandoned:
            del self._amplified[entry]
            return
        started, began_at = time.perf_counter(), time.monotonic()
        outcomes: Sequence[Outcome]
        is_whole = False
        try:
            with self._heartbeat.during("chunk", entry.model.card.name, _request_ids([entry])):
                if self._is_last_call(amplified, work):
                    outcomes = work.finish_now()
                else:
                    outcomes = work.advance()
                    is_whole = work.is_done and not any(isinstance(outcome, SpecFailed) for outcome in outcomes)
        except BaseException as error:  # noqa: BLE001 - a served model is foreign code and may even call sys.exit
            failure = row_failure(error, entry.job.model)
            _log.warning(
                "amplified work failed", request_id=entry.job.request_id, model=entry.job.model, error=repr(error)
            )
            outcomes = [SpecFailed(spec_index=work.spec_index, error=failure)]
            work.close()
        seconds = time.perf_counter() - started
        amplified.spent += seconds
        failed = next((outcome.error for outcome in outcomes if isinstance(outcome, SpecFailed)), None)
        method = entry.job.specs[work.spec_index].method
        entry.trace.stage("chunk", began_at, time.monotonic(), failed, spec=work.spec_index, method=method)
        if is_whole:
            queue.observe_whole(entry.demand.works[work.spec_index], amplified.spent, time.monotonic())
        if work.is_done:
            amplified.works.popleft()
            amplified.spent = 0.0
        if amplified.works:
            deliver(loop, [(entry.reply, outcome) for outcome in outcomes])
            self._put_back(queue, amplified, 0.0 if work.is_done else seconds)
        else:
            del self._amplified[entry]
            deliver(loop, [(entry.reply, outcome) for outcome in (*outcomes, amplified.facts)])
        self._metrics.pass_seconds.labels(entry.job.model, entry.job.version, "amplified").observe(seconds)

    @staticmethod
    def _put_back(queue: DeviceQueue, amplified: _Amplified, chunk_seconds: float) -> None:
        entry = amplified.entry
        works = [entry.demand.works[work.spec_index] for work in amplified.works]
        queue.put_back(entry, works, amplified.spent, chunk_seconds, time.monotonic())

    def _is_last_call(self, amplified: _Amplified, work: Amplification) -> bool:
        """Whether the deadline would pass before this work had its turn again, and the caller takes what there is."""
        now, before = time.monotonic(), amplified.turned_at
        amplified.turned_at = now
        job = amplified.entry.job
        if job.deadline is None or not work.allows_partial:
            return False
        # The last round also tells what others in line, and passes in between, took.
        turn = max(work.chunk_seconds * len(self._amplified), 0.0 if before is None else now - before)
        return now + turn + last_call_seconds(job) > job.deadline

    def _observe(self, facts: PassFacts, closed: Closed, model: str, version: str) -> None:
        metrics = self._metrics
        metrics.batch_rows.labels(model, version).observe(facts.rows)
        metrics.explanations_per_pass.labels(model).observe(facts.explanations)
        metrics.pass_seconds.labels(model, version, "forward").observe(facts.forward_seconds)
        metrics.pass_seconds.labels(model, version, "backward").observe(facts.backward_seconds)
        metrics.pass_seconds.labels(model, version, "maps").observe(closed.map_seconds)


def _request_ids(entries: Sequence[Entry]) -> list[str]:
    return [entry.job.request_id for entry in entries]


def _stacked(samples: Sequence[npt.NDArray[np.generic]], rows: int) -> npt.NDArray[np.generic]:
    """(rows, …): filled up with copies of the last, which nobody reads, for archives that take one batch size only."""
    return np.stack([*samples, *[samples[-1]] * (rows - len(samples))])


def _forwarded(event: Forwarded, batch: _Batch, started_at: float, facts: PassFacts) -> list[tuple[Reply, Outcome]]:
    letters: list[tuple[Reply, Outcome]] = []
    for row, entry in enumerate(batch.entries):
        if not event.finite[row]:
            letters.append((entry.reply, not_finite(entry.job.model)))
            continue
        reading = event.readings[row]
        letters.append((entry.reply, RowForwarded(reading=reading, started_at=started_at, facts=facts)))
        if batch.hindrance is not None:
            failed = Standing(entry.job).fail(reading, batch.hindrance)
            letters += [(entry.reply, failure) for failure in failed]
    return letters

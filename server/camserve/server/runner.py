"""The device thread: runs one batch at a time, sends predictions before any gradient, maps as they are made.

`dispatch.py` hands it batches; outcomes go to each entry's reply. A batch that fails is halved until the row at fault stands
alone: out of memory gets smaller passes, a bad row fails by itself and its neighbours are answered. Specs that need many passes
over their row stay behind the batch as amplified work, which `advance` takes on by one chunk at a time, in turn.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import structlog
import torch

from camserve.server.engine.passes import Amplification, Closed, Forwarded, Mapped, run_pass
from camserve.server.failures import not_finite, row_failure
from camserve.server.jobs import PassFacts, SpecFailed
from camserve.server.metrics import Metrics
from camserve.server.queue import Entry
from camserve.server.replies import Outcome, Reply, RowForwarded, deliver

__all__ = ["Runner"]

_T = TypeVar("_T")

_log = structlog.get_logger("camserve.runner")


# The best map so far has still to be encoded and sent: a tenth of the time that the caller gave, within bounds.
_LAST_CALL_SHARE = 0.1
_SHORTEST_LAST_CALL_SECONDS = 0.05
_LONGEST_LAST_CALL_SECONDS = 0.25


@dataclasses.dataclass(slots=True, kw_only=True)
class _Amplified:
    """A request whose pass is over and whose amplified specs are still at work; owned by the device thread.

    Attributes:
        entry: whose.
        facts: of the pass.
        works: of each spec, in order; the first is at work.
        turned_at: monotonic seconds at which its last turn began; None before the first.
    """

    entry: Entry
    facts: PassFacts
    works: collections.deque[Amplification]
    turned_at: float | None = None


class Runner:
    """Owns the device thread. Everything that touches a program runs there."""

    def __init__(self, metrics: Metrics, torch_threads: int) -> None:
        self._metrics = metrics
        self._amplified: collections.deque[_Amplified] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="camserve-device")
        if torch_threads:
            torch.set_num_threads(torch_threads)

    async def call(self, work: Callable[[], _T]) -> _T:
        """Runs something else on the device thread, such as loading a model; whatever it raises comes as an Exception."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, _contained, work)

    async def run(self, entries: Sequence[Entry]) -> None:
        """Runs one batch; returns when every entry has its outcomes. Never raises for a row's sake."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._run, entries, loop)

    @property
    def has_amplified(self) -> bool:
        """Whether amplified work is left; between calls of `run` and `advance` nothing but they changes it."""
        return bool(self._amplified)

    async def advance(self) -> None:
        """Does one chunk of the amplified work that has waited longest. Never raises for its sake."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._advance, loop)

    async def close(self, timeout_seconds: float) -> bool:
        """Ends the thread after what it is at; says whether it came to an end in time."""
        idle = asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)
        done, _ = await asyncio.wait({idle}, timeout=timeout_seconds)
        self._thread.shutdown(wait=bool(done), cancel_futures=True)
        return bool(done)

    def _run(self, entries: Sequence[Entry], loop: asyncio.AbstractEventLoop) -> None:
        started = time.perf_counter()
        todo = [list(entries)]
        while todo:
            batch = [entry for entry in todo.pop() if not entry.reply.is_abandoned]
            if not batch:
                continue
            try:
                self._pass(batch, loop)
            except BaseException as error:  # noqa: BLE001 - a served model is foreign code and may even call sys.exit
                failure = row_failure(error, batch[0].job.model)
                if len(batch) == 1:
                    _log.warning(
                        "row failed", request_id=batch[0].job.request_id, model=batch[0].job.model, error=repr(error)
                    )
                    deliver(loop, [(batch[0].reply, failure)])
                else:
                    _log.warning("pass failed, halving", rows=len(batch), model=batch[0].job.model, error=repr(error))
                    middle = len(batch) // 2
                    todo += [batch[middle:], batch[:middle]]
        self._metrics.device_busy.inc(time.perf_counter() - started)

    def _pass(self, batch: list[Entry], loop: asyncio.AbstractEventLoop) -> None:
        model = batch[0].model
        card = model.card
        started_at = time.monotonic()
        rows = max(len(batch), card.static_batch_rows or 0)
        inputs = torch.from_numpy(_stacked([entry.sample.tensor for entry in batch], rows))
        extras = [
            torch.from_numpy(_stacked([entry.sample.extras[extra.name] for entry in batch], rows))
            for extra in card.extra_inputs
        ]
        specs = [entry.job.specs for entry in batch] + [()] * (rows - len(batch))
        amplified: dict[int, collections.deque[Amplification]] = collections.defaultdict(collections.deque)

        def is_wanted(row: int) -> bool:
            return row < len(batch) and not batch[row].reply.is_abandoned

        for event in run_pass(model.pass_model, inputs, specs, extras=extras, is_wanted=is_wanted):
            match event:
                case Forwarded():
                    deliver(loop, _forwarded(event, batch, started_at))
                case Mapped():
                    deliver(loop, [(batch[event.row].reply, event.result)])
                case Amplification():
                    amplified[event.row].append(event)
                case Closed():
                    facts = PassFacts(
                        rows=rows,
                        explanations=event.explanations,
                        device=card.device,
                        dtype=card.dtype,
                        plan="tapped" if any(specs) else "forward",
                        forward_seconds=event.forward_seconds,
                        backward_seconds=event.backward_seconds,
                    )
                    self._observe(facts, event, card.name)
                    done = [entry for row, entry in enumerate(batch) if row not in amplified]
                    deliver(loop, [(entry.reply, facts) for entry in done])
                    for row, works in amplified.items():
                        self._amplified.append(_Amplified(entry=batch[row], facts=facts, works=works))

    def _advance(self, loop: asyncio.AbstractEventLoop) -> None:
        """One chunk of the first in line, which then goes to the end of it."""
        started = time.perf_counter()
        first = self._amplified.popleft()
        entry, work = first.entry, first.works[0]
        if entry.reply.is_abandoned:
            return
        outcomes: Sequence[Outcome]
        try:
            outcomes = work.finish_now() if self._is_last_call(first, work) else work.advance()
        except BaseException as error:  # noqa: BLE001 - a served model is foreign code and may even call sys.exit
            failure = row_failure(error, entry.job.model)
            _log.warning(
                "amplified work failed", request_id=entry.job.request_id, model=entry.job.model, error=repr(error)
            )
            outcomes = [SpecFailed(spec_index=work.spec_index, error=failure)]
            work.close()
        if work.is_done:
            first.works.popleft()
        if first.works:
            self._amplified.append(first)
        else:
            outcomes = [*outcomes, first.facts]
        deliver(loop, [(entry.reply, outcome) for outcome in outcomes])
        seconds = time.perf_counter() - started
        self._metrics.pass_seconds.labels(entry.job.model, "amplified").observe(seconds)
        self._metrics.device_busy.inc(seconds)

    def _is_last_call(self, amplified: _Amplified, work: Amplification) -> bool:
        """Whether the deadline would pass before this work had its turn again, and the caller takes what there is."""
        now, before = time.monotonic(), amplified.turned_at
        amplified.turned_at = now
        job = amplified.entry.job
        if job.deadline is None or not work.allows_partial:
            return False
        # The last round also tells what others in line, and passes in between, took.
        turn = max(work.chunk_seconds * (len(self._amplified) + 1), 0.0 if before is None else now - before)
        share = _LAST_CALL_SHARE * (job.deadline - job.received_at)
        last_call = min(max(share, _SHORTEST_LAST_CALL_SECONDS), _LONGEST_LAST_CALL_SECONDS)
        return now + turn + last_call > job.deadline

    def _observe(self, facts: PassFacts, closed: Closed, model: str) -> None:
        metrics = self._metrics
        metrics.batch_rows.labels(model).observe(facts.rows)
        metrics.explanations_per_pass.labels(model).observe(facts.explanations)
        metrics.pass_seconds.labels(model, "forward").observe(facts.forward_seconds)
        metrics.pass_seconds.labels(model, "backward").observe(facts.backward_seconds)
        metrics.pass_seconds.labels(model, "maps").observe(closed.map_seconds)


def _stacked(samples: Sequence[npt.NDArray[np.generic]], rows: int) -> npt.NDArray[np.generic]:
    """(rows, …): filled up with copies of the last, which nobody reads, for archives that take one batch size only."""
    return np.stack([*samples, *[samples[-1]] * (rows - len(samples))])


def _forwarded(event: Forwarded, batch: list[Entry], started_at: float) -> list[tuple[Reply, Outcome]]:
    letters: list[tuple[Reply, Outcome]] = []
    for row, entry in enumerate(batch):
        if event.finite[row]:
            letters.append((entry.reply, RowForwarded(reading=event.readings[row], started_at=started_at)))
        else:
            letters.append((entry.reply, not_finite(entry.job.model)))
    return letters


def _contained(work: Callable[[], _T]) -> _T:
    """Runs foreign code; what would end the process or cannot travel in a Future becomes an ordinary error."""
    try:
        return work()
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error

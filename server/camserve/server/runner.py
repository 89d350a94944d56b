"""The device thread: runs one batch at a time, sends predictions before any gradient, maps as they are made.

`dispatch.py` hands it batches; outcomes go to each entry's reply. A batch that fails is halved until the row at fault stands
alone: out of memory gets smaller passes, a bad row fails by itself and its neighbours are answered.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import structlog
import torch

from camserve.server.engine.passes import Closed, Forwarded, Mapped, run_pass
from camserve.server.errors import CamserveError, ExecutionFailed, Reason
from camserve.server.jobs import PassFacts
from camserve.server.metrics import Metrics
from camserve.server.queue import Entry
from camserve.server.replies import Outcome, Reply, RowForwarded, deliver

__all__ = ["Runner"]

_T = TypeVar("_T")

_log = structlog.get_logger("camserve.runner")


class Runner:
    """Owns the device thread. Everything that touches a program runs there."""

    def __init__(self, metrics: Metrics, torch_threads: int) -> None:
        self._metrics = metrics
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
                failure = _failure(error, batch)
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
        rows = np.stack([entry.sample.tensor for entry in batch])
        if card.static_batch_rows is not None and len(batch) < card.static_batch_rows:
            # The archive takes one batch size only: fill up with copies of the last row, which nobody reads.
            rows = np.concatenate([rows, np.repeat(rows[-1:], card.static_batch_rows - len(batch), axis=0)])
        inputs = torch.from_numpy(rows).to(device=model.program.device, dtype=model.program.dtype)
        specs = [entry.job.specs for entry in batch] + [()] * (len(rows) - len(batch))

        def is_wanted(row: int) -> bool:
            return row < len(batch) and not batch[row].reply.is_abandoned

        for event in run_pass(model.pass_model, inputs, specs, is_wanted=is_wanted):
            match event:
                case Forwarded():
                    deliver(loop, _forwarded(event, batch, started_at))
                case Mapped():
                    deliver(loop, [(batch[event.row].reply, event.result)])
                case Closed():
                    facts = PassFacts(
                        rows=len(rows),
                        explanations=event.explanations,
                        device=card.device,
                        dtype=card.dtype,
                        plan="tapped" if any(specs) else "forward",
                        forward_seconds=event.forward_seconds,
                        backward_seconds=event.backward_seconds,
                    )
                    self._observe(facts, event, card.name)
                    deliver(loop, [(entry.reply, facts) for entry in batch])

    def _observe(self, facts: PassFacts, closed: Closed, model: str) -> None:
        metrics = self._metrics
        metrics.batch_rows.labels(model).observe(facts.rows)
        metrics.explanations_per_pass.labels(model).observe(facts.explanations)
        metrics.pass_seconds.labels(model, "forward").observe(facts.forward_seconds)
        metrics.pass_seconds.labels(model, "backward").observe(facts.backward_seconds)
        metrics.pass_seconds.labels(model, "maps").observe(closed.map_seconds)


def _forwarded(event: Forwarded, batch: list[Entry], started_at: float) -> list[tuple[Reply, Outcome]]:
    letters: list[tuple[Reply, Outcome]] = []
    for row, entry in enumerate(batch):
        if event.finite[row]:
            letters.append((entry.reply, RowForwarded(logits=event.logits[row], started_at=started_at)))
        else:
            letters.append(
                (
                    entry.reply,
                    ExecutionFailed(
                        Reason.MODEL_FAILED,
                        f"model {entry.job.model!r} gave scores that are not finite for this input; nothing can be explained",
                        metadata={"model": entry.job.model},
                    ),
                )
            )
    return letters


def _contained(work: Callable[[], _T]) -> _T:
    """Runs foreign code; what would end the process or cannot travel in a Future becomes an ordinary error."""
    try:
        return work()
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _failure(error: BaseException, batch: list[Entry]) -> CamserveError:
    if isinstance(error, CamserveError):
        return error
    model = batch[0].job.model
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return ExecutionFailed(
            Reason.OUT_OF_MEMORY,
            f"the device ran out of memory for one row of model {model!r}; use a smaller input or a deeper layer",
            metadata={"model": model},
        )
    first_line = str(error).strip().split("\n", 1)[0]
    return ExecutionFailed(
        Reason.MODEL_FAILED,
        f"model {model!r} failed on this input: {type(error).__name__}: {first_line}",
        metadata={"model": model},
    )

"""The rows of one request, each a job of its own, under way together: they share passes as the jobs of any callers do.

For `inference.py`. Leaving the iteration abandons what is still to be done for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeAlias

from camserve.server import jobs
from camserve.server.models.repository import ServedModel
from camserve.server.pipeline import Pipeline
from camserve.server.tracing import RequestTrace

__all__ = ["RowError", "row_events"]


class RowError(Exception):
    """What a row's job raised; `__cause__` is that."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


_Item: TypeAlias = tuple[int, jobs.Event | Exception | None]


async def row_events(
    pipeline: Pipeline, rows: Sequence[jobs.Job], model: ServedModel, trace: RequestTrace
) -> AsyncGenerator[tuple[int, jobs.Event], None]:
    """Yields the events of every row with its number, as they come.

    Raises:
        RowError: a row cannot be answered; the others are abandoned.
    """
    # One event of each row may wait here: rows do not run ahead of whoever reads slowly.
    waiting: asyncio.Queue[_Item] = asyncio.Queue(len(rows))
    tasks = [asyncio.create_task(_follow(pipeline, row, job, model, trace, waiting)) for row, job in enumerate(rows)]
    try:
        running = len(tasks)
        while running:
            row, event = await waiting.get()
            if event is None:
                running -= 1
            elif isinstance(event, Exception):
                raise RowError(row) from event
            else:
                yield row, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _follow(
    pipeline: Pipeline,
    row: int,
    job: jobs.Job,
    model: ServedModel,
    trace: RequestTrace,
    waiting: asyncio.Queue[_Item],
) -> None:
    try:
        async with contextlib.aclosing(pipeline.explain(job, model, trace)) as events:
            async for event in events:
                await waiting.put((row, event))
    except Exception as error:  # noqa: BLE001 - told to whoever waits
        await waiting.put((row, error))
    else:
        await waiting.put((row, None))

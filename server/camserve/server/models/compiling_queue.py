"""Compiles plans beside the serving, one model after another; what came of it is told on the card.

`announcements.py` adds a model when it serves and gives it up when it goes. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import structlog

from camserve.server.models.compiling import OnDevice, compile_plan
from camserve.server.models.repository import Repository, ServedModel
from camserve.server.models.sources import ModelSource

__all__ = ["CompilingQueue"]

_log = structlog.get_logger("camserve.compiling")


class CompilingQueue:
    """Owns the compiling of every model that asks for it.

    Args:
        repository: whose cards tell what came of it.
        cache: folder of packages that outlive the server; None for none.
        on_device: runs a piece on the device thread.
    """

    def __init__(self, repository: Repository, *, cache: Path | None, on_device: OnDevice) -> None:
        self._repository = repository
        self._cache = cache
        self._on_device = on_device
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._may_begin = asyncio.Event()

    def add(self, source: ModelSource, served: ServedModel) -> None:
        """Compiles a model's plan when its turn comes."""
        number = served.load_number
        task = asyncio.create_task(self._compile(source, served), name="camserve-compile")
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    def begin(self) -> None:
        """From now on plans are compiled: what a server starts with is loaded, which a compiler would slow down."""
        self._may_begin.set()

    async def give_up(self, served: ServedModel) -> None:
        """The model goes; returns when nothing here refers to it."""
        await _ended([task for number, task in self._tasks.items() if number == served.load_number])

    async def wait(self) -> None:
        """Returns when every plan is compiled or given up."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def close(self) -> None:
        """Gives everything up."""
        await _ended(list(self._tasks.values()))

    async def _compile(self, source: ModelSource, served: ServedModel) -> None:
        await self._may_begin.wait()
        async with self._one_at_a_time:
            try:
                note = await compile_plan(source, served, cache=self._cache, on_device=self._on_device)
            except Exception as error:  # noqa: BLE001 - compilers are foreign code; what serves must go on
                note = f"not compiled: {error}"
        card = dataclasses.replace(served.card, notes=(*served.card.notes, note))
        self._repository.set_card(served, card)
        _log.info("plan compiled", model=card.name, version=card.version, note=note)


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)

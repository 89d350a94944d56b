"""Watches a repository's folder, and says of each model in it when it has changed and come to rest.

`app.py` starts it behind the first loading. What is being written is left alone: a model's turn comes when nothing in its folder
has changed for a moment, and then `lifecycle.py` looks at it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
import watchfiles

from camserve.server.models.sources import is_model_name

__all__ = ["watch"]

_log = structlog.get_logger("camserve.models")

_SETTLED_SECONDS = 1.0
# A folder on a network that went away may come back, and nobody tells when.
_AGAIN_SECONDS = 10.0


async def watch(
    root: Path, follow: Callable[[str], Awaitable[None]], *, settled_seconds: float = _SETTLED_SECONDS
) -> None:
    """Runs until cancelled.

    Args:
        root: of the repository.
        follow: looks at the model of that name; called for all of them at first, and whenever one was changed or went.
        settled_seconds: without a change after which a model counts as written.
    """
    settling = _Settling(follow, settled_seconds)
    try:
        while True:
            try:
                # They are looked at a moment from now, when the watch has begun.
                for name in await asyncio.to_thread(_names_in, root):
                    settling.touch(name)
                async for changes in watchfiles.awatch(root, watch_filter=None, step=50, debounce=200):
                    for name in _names_of(changes, root):
                        settling.touch(name)
            except (OSError, RuntimeError) as error:
                _log.error("the repository cannot be watched", repository=str(root), error=str(error))
                await asyncio.sleep(_AGAIN_SECONDS)
    finally:
        settling.close()


class _Settling:
    """Waits for each model by itself: one that is being written for an hour keeps nobody else waiting."""

    def __init__(self, follow: Callable[[str], Awaitable[None]], seconds: float) -> None:
        self._follow = follow
        self._seconds = seconds
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def touch(self, name: str) -> None:
        """Something of a model changed just now."""
        if not is_model_name(name):
            return
        if name in self._timers:
            self._timers.pop(name).cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(self._seconds, self._settled, name)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()

    def _settled(self, name: str) -> None:
        del self._timers[name]
        task = asyncio.create_task(self._look(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look(self, name: str) -> None:
        await self._follow(name)


def _names_in(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.is_dir()]


def _names_of(changes: set[tuple[watchfiles.Change, str]], root: Path) -> set[str]:
    """The models whose folders the changed files are in."""
    resolved = root.resolve()
    paths = [Path(path) for _, path in changes]
    return {path.relative_to(resolved).parts[0] for path in paths if resolved in path.parents}

"""Who is inside a loaded model: requests that were let in and are not answered yet. Lives on the event loop; no locks.

`pipeline.py` enters for each request; `lifecycle.py` waits until the last one has left before it frees a model's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

__all__ = ["Guests"]


class Guests:
    """Counts them, for one model as it was loaded once.

    Attributes:
        last_seen: monotonic seconds at which somebody last came or left, at first those at which this was made.
    """

    def __init__(self) -> None:
        self.last_seen = time.monotonic()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        """How many are inside."""
        return self._inside

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """One is inside for the length of a `with` block."""
        self._inside += 1
        self.last_seen = time.monotonic()
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            self.last_seen = time.monotonic()
            if not self._inside:
                self._empty.set()

    async def wait_until_empty(self) -> None:
        """Returns when the last one has left."""
        await self._empty.wait()

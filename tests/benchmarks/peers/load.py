"""The load: so many callers, each of whom asks for the next image as soon as the last one is answered.

Takes an `Ask` of `answers.py` and gives the times of all answers, which `figures.py` turns into figures.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence

from benchmarks.peers.answers import Ask
from benchmarks.peers.figures import Finished


async def closed_loop(ask: Ask, images: Sequence[bytes], *, concurrency: int, seconds: float) -> list[Finished]:
    """Asks until `seconds` have passed since every caller was answered once, and waits for what is then under way.

    Returns:
        All answers in order of time, those of the first lap and of the end included.
    """
    finished: list[Finished] = []
    next_image = itertools.cycle(images)
    ends_at = float("inf")

    async def caller() -> None:
        nonlocal ends_at
        while time.perf_counter() < ends_at:
            started = time.perf_counter()
            await ask(next(next_image))
            now = time.perf_counter()
            finished.append(Finished(at=now, seconds=now - started))
            if len(finished) == concurrency:
                ends_at = now + seconds

    async with asyncio.TaskGroup() as callers:
        for _ in range(concurrency):
            callers.create_task(caller())
    return finished

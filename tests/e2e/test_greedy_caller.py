"""A greedy caller, and another one: what the other waits for, counted in pieces of the device's work rather than seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from support.held import Held, held_process
from support.servers import until
from support.vanishing import VanishingProxy

from camserve.client import AsyncClient, Overloaded, TensorInput

ROW = TensorInput(np.zeros((3, 32, 32), np.float32))
MAY_HAVE = 12
# Every one is held to the same, so their slowest is no other than the 99th percentile of many.
REQUESTS = 15


@contextlib.asynccontextmanager
async def greed(held: Held, method: str) -> AsyncIterator[AsyncClient]:
    """A caller that always has as much under way as it may have: each answer is followed by the next request."""

    async def goes_on(client: AsyncClient) -> None:
        while True:
            # Who is answered may be back before the server has counted that it left.
            with contextlib.suppress(Overloaded):
                await client.explain(ROW, model="held", specs=[method])

    async with AsyncClient(held.served.target, retries=0, timeout=None) as client:
        tasks = [asyncio.create_task(goes_on(client)) for _ in range(MAY_HAVE)]
        await until(lambda: held.served.metric("camserve_requests_in_flight") == MAY_HAVE)
        try:
            yield client
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def pieces(held: Held) -> tuple[float, float]:
    """How many passes, and how many chunks of amplified work, have ended."""
    metric = held.served.metric
    return metric("camserve_batch_rows_count"), metric("camserve_pass_seconds_count", phase="amplified")


async def is_chunk(held: Held) -> bool:
    """Lets the piece that is under way end, waits until the next has begun, and says whether it was a chunk.

    A chunk may take several forwards. What has ended is counted before the next begins, and there is always a next.
    """
    passes, chunks = pieces(held)
    while True:
        held.gate.let(1)
        await asyncio.to_thread(held.gate.begun)
        if pieces(held) != (passes, chunks):
            return pieces(held)[1] > chunks


@pytest.mark.parametrize("method", ["grad-cam", "score-cam"])
async def test_another_caller_waits_for_one_piece_and_at_most_a_slice(tmp_path: Path, method: str):
    """Each request of another rides in the very next pass, behind the piece under way and, where chunks are behind, one slice.

    The one who is greedy has 12 requests under way all the time, passes or chunks of amplified work, and is refused a 13th.
    """
    limits = {"caller_concurrency": MAY_HAVE, "max_requests": 64, "max_batch": 4}
    slices = 0
    with held_process(tmp_path, **limits) as held, VanishingProxy(held.served.target, source="127.0.0.2") as proxy:
        metric = held.served.metric
        held.gate.close()
        async with greed(held, method) as greedy, AsyncClient(proxy.target, retries=0, timeout=120) as other:
            await asyncio.to_thread(held.gate.begun)
            for _ in range(REQUESTS):
                await until(lambda: metric("camserve_requests_in_flight") == MAY_HAVE)
                with pytest.raises(Overloaded, match="TOO_MANY_CONCURRENT"):
                    await greedy.explain(ROW, model="held")
                call = asyncio.create_task(other.explain(ROW, model="held", specs=["grad-cam"]))
                await until(lambda: metric("camserve_requests_in_flight") == MAY_HAVE + 1)
                await is_chunk(held)
                if await is_chunk(held):
                    slices += 1
                    await is_chunk(held)
                # Nothing else is let through the gate, so that it can only have ridden in what was.
                assert (await call).heatmaps
            chunks = pieces(held)[1]
            held.gate.open()
        await until(lambda: metric("camserve_requests_in_flight") == 0)

    assert (method == "score-cam") == (chunks > 0)
    print(f"\n{method}: {slices} of {REQUESTS} requests waited for a slice")  # noqa: T201 - told in docs

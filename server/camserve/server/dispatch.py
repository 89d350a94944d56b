"""The loop between queue and device: while the device is idle, take the next batch and run it. Awaits events, never polls."""

from __future__ import annotations

from camserve.server.queue import DeviceQueue
from camserve.server.runner import Runner

__all__ = ["dispatch"]


async def dispatch(queue: DeviceQueue, runner: Runner) -> None:
    """Runs batches one after another until cancelled."""
    while True:
        await runner.run(await queue.next_batch())

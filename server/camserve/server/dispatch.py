"""The loop between queue and device: while the device is idle, take the next batch and run it. Awaits events, never polls.

Amplified work goes on a chunk at a time, in turn with whatever batch is ready: neither waits for the other to end.
"""

from __future__ import annotations

from camserve.server.queue import DeviceQueue
from camserve.server.runner import Runner

__all__ = ["dispatch"]


async def dispatch(queue: DeviceQueue, runner: Runner) -> None:
    """Runs batches and chunks one after another until cancelled."""
    while True:
        entries = queue.ready_batch() if runner.has_amplified else await queue.next_batch()
        if entries:
            await runner.run(entries)
        if runner.has_amplified:
            await runner.advance()

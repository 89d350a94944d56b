"""The loop between queue and device: while something is to be run, the device thread takes one thing after another.

When nothing is, this waits for the queue to change, or for the moment that the planner named. Awaits events, never polls.
"""

from __future__ import annotations

from camserve.server.queue import DeviceQueue
from camserve.server.runner import Runner

__all__ = ["dispatch"]


async def dispatch(queue: DeviceQueue, runner: Runner) -> None:
    """Runs whatever the planner chooses until cancelled."""
    while True:
        queue.listen()
        ask_again_at = await runner.work(queue)
        await queue.changed(ask_again_at)

"""What waits for the device. One owner, the event loop; `pipeline.py` puts entries in, `dispatch.py` takes them out by plan."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from camserve.server.batching import BatchKey, Plan, Waiting, plan
from camserve.server.jobs import Job, Lane, Sample
from camserve.server.models.repository import ServedModel
from camserve.server.replies import Reply

__all__ = ["PATIENCE_SECONDS", "DeviceQueue", "Entry"]

PATIENCE_SECONDS: Mapping[Lane, float] = MappingProxyType(
    {Lane.INTERACTIVE: 1.0, Lane.STANDARD: 30.0, Lane.BULK: 300.0}
)
"""By lane: a request is planned as if it had to be answered within this time, however much later its deadline is.

The hurried go first, and whoever has waited longest goes before everybody in the end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A decoded request and the way back to its caller."""

    job: Job
    model: ServedModel
    sample: Sample
    reply: Reply
    waiting: Waiting


class DeviceQueue:
    """Decoded requests in order of arrival, and how many more are being decoded."""

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._entries: dict[int, Entry] = {}
        self._arriving: collections.Counter[tuple[str, str]] = collections.Counter()
        self._tickets = itertools.count()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._entries)

    def oldest_wait(self, now: float) -> float:
        """Seconds the oldest entry has waited; 0 when empty."""
        first = next(iter(self._entries.values()), None)
        return 0.0 if first is None else now - first.waiting.enqueued_at

    @contextlib.contextmanager
    def announced(self, model: ServedModel) -> Iterator[None]:
        """Tells the planner, for the length of a `with` block, that a request for this model is being decoded."""
        key = (model.card.name, model.card.version)
        self._arriving[key] += 1
        try:
            yield
        finally:
            self._arriving[key] -= 1
            self._changed.set()

    def put(self, job: Job, model: ServedModel, sample: Sample, reply: Reply, now: float) -> Entry:
        """Adds a decoded request."""
        ticket = next(self._tickets)
        waiting = Waiting(
            ticket=ticket,
            key=BatchKey(
                model=job.model,
                version=job.version,
                shape=sample.tensor.shape,
                dtype=str(sample.tensor.dtype),
                extra_shapes=tuple(values.shape for values in sample.extras.values()),
            ),
            max_rows=model.card.max_batch_rows,
            enqueued_at=now,
            # Who names no deadline, or a far one, must not be overtaken for ever by those who hurry.
            deadline=min(math.inf if job.deadline is None else job.deadline, now + PATIENCE_SECONDS[job.lane]),
        )
        entry = self._entries[ticket] = Entry(job=job, model=model, sample=sample, reply=reply, waiting=waiting)
        self._changed.set()
        return entry

    def drop(self, entry: Entry) -> bool:
        """Takes an entry out if it still waits, because its caller left; says whether it did."""
        return self._entries.pop(entry.waiting.ticket, None) is not None

    async def next_batch(self) -> Sequence[Entry]:
        """Waits until a pass should start and takes its entries out."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            decided = self._decide()
            if decided.tickets:
                return self._taken(decided)
            timeout = None if math.isinf(decided.ask_again_at) else max(0.0, decided.ask_again_at - loop.time())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout)

    def ready_batch(self) -> Sequence[Entry]:
        """Takes the entries of a pass out that should start now; none if none should."""
        return self._taken(self._decide())

    def _decide(self) -> Plan:
        return plan(
            [entry.waiting for entry in self._entries.values()],
            self._arriving,
            window_seconds=self._window_seconds,
            now=asyncio.get_running_loop().time(),
        )

    def _taken(self, decided: Plan) -> list[Entry]:
        return [self._entries.pop(ticket) for ticket in decided.tickets]

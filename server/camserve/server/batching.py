"""Which waiting requests share the next pass: a pure function of what waits, what is arriving, the limits and the time.

`dispatch.py` calls `plan` whenever the device is idle and something changed. It never sleeps, locks or sees a tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

__all__ = ["BatchKey", "Plan", "Waiting", "plan"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """What requests must have in common to share a pass. Method, layer, target and encoding are not in it."""

    model: str
    version: str
    shape: tuple[int, ...]
    dtype: str
    extra_shapes: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One decoded request.

    Attributes:
        ticket: its place in order of arrival.
        key: whom it can ride with.
        max_rows: most rows its model takes in one pass.
        enqueued_at: monotonic seconds.
        deadline: monotonic seconds, or infinity.
    """

    ticket: int
    key: BatchKey
    max_rows: int
    enqueued_at: float
    deadline: float = math.inf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now: run these tickets, or, if there are none, ask again at `ask_again_at` or when something arrives."""

    tickets: tuple[int, ...] = ()
    ask_again_at: float = math.inf


def plan(
    waiting: Sequence[Waiting], arriving: Mapping[tuple[str, str], int], *, window_seconds: float, now: float
) -> Plan:
    """Plans the next pass.

    The group that holds the most urgent request (earliest deadline, then arrival) goes first, with as many of its rows as fit.
    A group that is not full waits up to `window_seconds` after its oldest arrival while requests for the same model are being
    decoded: they are known to come, and a pass costs far more than the wait. Another group that is ready goes meanwhile.

    Args:
        waiting: decoded requests, any order.
        arriving: by (model, version), how many are past the door and still being decoded.
        window_seconds: longest wait for them.
        now: monotonic seconds.
    """
    groups: dict[BatchKey, list[Waiting]] = {}
    for entry in sorted(waiting, key=lambda entry: (entry.deadline, entry.ticket)):
        groups.setdefault(entry.key, []).append(entry)
    ask_again_at = math.inf
    for key, entries in groups.items():
        opens_at = min(entry.enqueued_at for entry in entries) + window_seconds
        is_full = len(entries) >= entries[0].max_rows
        if is_full or not arriving.get((key.model, key.version)) or now >= opens_at:
            return Plan(tickets=tuple(entry.ticket for entry in entries[: entries[0].max_rows]))
        ask_again_at = min(ask_again_at, opens_at)
    return Plan(ask_again_at=ask_again_at)

"""Measures how long a device works on something, without making it wait.

`passes.py` wraps the forward, the gradients and each map in a `Lap`. On CUDA, work is only queued when Python goes on: a lap puts
an event before and after it into the stream, and asking for `seconds` waits for the second one.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import torch

__all__ = ["Lap"]


class Lap:
    """A context manager that times its body; `seconds` may be read after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started_at = 0.0
        self._ended_at = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            self._events = (_event(), _event())
            self._events[0].record(torch.cuda.current_stream(self._device))
        self._started_at = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended_at = time.perf_counter()
        if self._events is not None:
            self._events[1].record(torch.cuda.current_stream(self._device))

    @property
    def seconds(self) -> float:
        """Time between the start and the end of the body's work, on the device where it has its own clock."""
        if self._events is None:
            return self._ended_at - self._started_at
        start, end = self._events
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it without annotations.

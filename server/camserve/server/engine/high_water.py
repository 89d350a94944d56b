"""Measures how much memory something needs at its height, on the device where it runs.

`entries/` wraps the passes of a model that is checked in a `HighWater`. On CUDA the device's allocator tells; on a CPU it is the
resident memory of the process, which the kernel tells on Linux, so that nothing else should run beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

__all__ = ["HighWater"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_KIBIBYTE = 1024


class HighWater:
    """A context manager around some work; `gained_bytes` may be read after it.

    Attributes:
        gained_bytes: how far memory rose above what was held before; None where that cannot be told.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = 0
        self.gained_bytes: int | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        is_cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if is_cuda else _resident("VmHWM")
        self.gained_bytes = max(0, peak - self._before)


def _reset() -> int | None:
    """Lets the kernel forget the process's peak; returns what is resident now, or None where the kernel has no such thing."""
    with contextlib.suppress(AttributeError, OSError):  # Another C library than glibc.
        # What was freed but not given back would be used again, and so not be seen to grow.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text(_RESET_PEAK, encoding="ascii")
        return _resident("VmRSS")
    except OSError:
        return None


def _resident(line: str) -> int:
    found = re.search(rf"^{line}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return 0 if found is None else int(found[1]) * _KIBIBYTE

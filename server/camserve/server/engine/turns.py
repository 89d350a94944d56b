"""Where work runs that measures the device or makes it warm: at once, or between the passes of a server that goes on serving.

`models/` hands an `InTurn` down while it loads a model; what it wraps is short, a pass or a few, since requests wait meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

__all__ = ["InTurn", "at_once"]

_T = TypeVar("_T")


class InTurn(Protocol):
    """Runs a piece of work where passes run, and waits for it."""

    def __call__(self, work: Callable[[], _T], /) -> _T:
        """Returns what the work returns, raises what it raises."""
        ...


def at_once(work: Callable[[], _T]) -> _T:
    """In this thread: nobody else uses the device."""
    return work()

"""The thread in which models are loaded while others serve.

`lifecycle.py` has one. It gives way to the threads that serve: what it computes, and what the threads it begins compute, has
lower priority. Only a little lower, since Python's lock knows no priorities: who waits for that lock waits for this thread too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from camserve.server.engine.turns import InTurn
from camserve.server.failures import contained

__all__ = ["LoadingThread", "OnDevice"]

_T = TypeVar("_T")

_NICENESS = 5


class OnDevice(Protocol):
    """Runs something on the device thread."""

    def __call__(self, work: Callable[[], _T], /) -> Coroutine[Any, Any, _T]:
        """Returns what the work returns, raises what it raises."""
        ...


class LoadingThread:
    """Runs one piece of work after another. Owned by the event loop."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "camserve-loading", initializer=_give_way)
        self._awaited: concurrent.futures.Future[Any] | None = None
        self._at_work = 0
        self._is_closed = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs in it."""
        return not self._at_work

    async def run(self, work: Callable[[], _T]) -> _T:
        """Runs foreign code; whatever it raises comes as an Exception."""
        future = self._thread.submit(contained, work)
        self._at_work += 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _soon(loop, self._is_done))
        return await asyncio.wrap_future(future)

    def in_turn(self, on_device: OnDevice) -> InTurn:
        """What the work calls from its thread to have a piece of it run on the device thread, and wait for that.

        Args:
            on_device: runs a piece on the device thread; awaited on the loop that this is called on.
        """
        loop = asyncio.get_running_loop()

        def run(piece: Callable[[], _T]) -> _T:
            if self._is_closed:
                raise RuntimeError("the server is shutting down")
            awaited = asyncio.run_coroutine_threadsafe(on_device(piece), loop)
            self._awaited = awaited
            if self._is_closed:  # By now: nobody else would tell this thread.
                awaited.cancel()
            return awaited.result()

        return run

    def close(self) -> None:
        """Takes no more work; what runs goes on to its end, or to where it next wants the device."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._awaited is not None:
            self._awaited.cancel()

    def _is_done(self) -> None:
        self._at_work -= 1


def _soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # The loop is closed: nobody asks any more.
        loop.call_soon_threadsafe(callback)


def _give_way() -> None:
    # On Linux a thread has a priority of its own, which those it begins inherit. Elsewhere it keeps that of the process.
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)

"""Finds out that the server hangs: the device thread in one piece of work, or the event loop in anything.

`app.py` starts it. It lives on a thread of its own, which looks at the heartbeat and asks the loop to answer, tells when
something begins or ceases to hang, and writes the stack of what hangs to the log.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable

import structlog

from camserve.server.heartbeat import Heartbeat, Piece
from camserve.server.metrics import Metrics

__all__ = ["Watchdog"]

_log = structlog.get_logger("camserve.watchdog")

_LONGEST_INTERVAL_SECONDS = 1.0
_LOOKS_PER_STALL = 4


@dataclasses.dataclass(slots=True)
class _Watched:
    """One thread that may hang.

    Attributes:
        task: what it is at, any object; None while it is idle.
        seconds: for which it has been seen at it.
        is_stalled: whether that was too long.
    """

    task: object = None
    seconds: float = 0.0
    is_stalled: bool = False


class Watchdog:
    """Looks every second, or more often where `stall_seconds` is short.

    What counts is time that was seen to pass: in a process that was stopped, or on a machine that slept, nothing hung.

    Args:
        heartbeat: of the device thread.
        loop: the event loop, whose thread makes this object.
        stall_seconds: longer than this, one piece of work hangs.
        metrics: where it is told.
        on_change: called on the loop, as soon as that answers, with why the server hangs, or "" when it no longer does.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        *,
        loop: asyncio.AbstractEventLoop,
        stall_seconds: float,
        metrics: Metrics,
        on_change: Callable[[str], None],
    ) -> None:
        self._heartbeat = heartbeat
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._stall_seconds = stall_seconds
        self._interval = min(_LONGEST_INTERVAL_SECONDS, stall_seconds / _LOOKS_PER_STALL)
        self._metrics = metrics
        self._on_change = on_change
        self._device, self._event_loop = _Watched(), _Watched()
        self._question: object = None
        self._ended = threading.Event()
        self.stall = ""
        """Why the server hangs; empty while it does not. Read from any thread."""
        for name in ("device", "loop"):
            metrics.stalled.labels(name).set(0)
        metrics.device_piece_seconds.set_function(heartbeat.piece_seconds)
        self._thread = threading.Thread(target=self._watch, name="camserve-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            self._look(min(now - looked_at, 2 * self._interval))
            looked_at = now

    def _look(self, seconds: float) -> None:
        piece = self._heartbeat.piece
        device_changed = self._judge(self._device, piece if piece is None or piece.is_timed else None, seconds)
        loop_changed = self._judge(self._event_loop, self._ask_loop(), seconds)
        if not device_changed and not loop_changed:
            return
        stalls = []
        if self._device.is_stalled and piece is not None:
            stalls.append(f"the device thread hangs in a {piece.kind}{f' of {piece.model}' if piece.model else ''}")
        if self._event_loop.is_stalled:
            stalls.append("the event loop does not answer")
        # Told before it is logged: whoever reads the log may hang as well.
        self.stall = " and ".join(stalls)
        self._metrics.stalled.labels("device").set(self._device.is_stalled)
        self._metrics.stalled.labels("loop").set(self._event_loop.is_stalled)
        self._loop.call_soon_threadsafe(self._on_change, self.stall)
        if device_changed:
            self._log_device(piece)
        if loop_changed:
            self._log_loop()

    def _judge(self, watched: _Watched, task: object, seconds: float) -> bool:
        """Takes note of what a thread is at; says whether it began or ceased to hang."""
        watched.seconds = watched.seconds + seconds if task is not None and task is watched.task else 0.0
        watched.task = task
        was_stalled, watched.is_stalled = watched.is_stalled, watched.seconds > self._stall_seconds
        return was_stalled is not watched.is_stalled

    def _ask_loop(self) -> object:
        """The question that the loop has not answered yet; None if it has answered, and then it is asked anew."""
        if self._question is not None:
            return self._question
        self._question = object()
        self._loop.call_soon_threadsafe(self._answer)
        return None

    def _answer(self) -> None:
        self._question = None

    def _log_device(self, piece: Piece | None) -> None:
        if not self._device.is_stalled or piece is None:
            _log.warning("device goes on")
            return
        _log.error(
            "device stalled",
            at=piece.kind,
            model=piece.model,
            request_ids=list(piece.request_ids),
            seconds=round(self._heartbeat.piece_seconds(), 3),
            stack=_stack(piece.thread),
        )

    def _log_loop(self) -> None:
        if self._event_loop.is_stalled:
            _log.error("event loop stalled", stack=_stack(self._loop_thread))
        else:
            _log.warning("event loop goes on")


def _stack(thread: int) -> str:
    """Where a thread is: files, lines and their text, no values, since those hold images."""
    frame = sys._current_frames().get(thread)  # noqa: SLF001 - Python's own way to another thread's stack, public but for its name
    return "" if frame is None else "".join(traceback.format_stack(frame))

"""What the device thread is at: it says so at the start and the end of each pass, chunk and call.

The runner writes; `watchdog.py` looks at it from another thread, and the metrics page reads how long it has been.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from types import TracebackType

__all__ = ["Heartbeat", "Piece"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """One piece of work of the device thread.

    Attributes:
        kind: pass, chunk or call.
        model: name of the model that runs; empty for a call.
        request_ids: whose rows it runs.
        thread: that runs it, as `threading.get_ident` tells.
        began_at: monotonic seconds.
        is_timed: False for what may take as long as it likes, such as reading a model's file.
    """

    kind: str
    model: str
    request_ids: Sequence[str]
    thread: int
    began_at: float
    is_timed: bool = True


class Heartbeat:
    """The piece at work. One thread writes, others read: a plain attribute suffices."""

    def __init__(self) -> None:
        self.piece: Piece | None = None

    def during(self, kind: str, model: str = "", request_ids: Sequence[str] = (), *, is_timed: bool = True) -> _During:
        """For a `with` block around one piece of work, on the thread that does it."""
        return _During(
            self,
            Piece(
                kind=kind,
                model=model,
                request_ids=request_ids,
                thread=threading.get_ident(),
                began_at=time.monotonic(),
                is_timed=is_timed,
            ),
        )

    def piece_seconds(self) -> float:
        """Age of the piece at work; 0 while there is none."""
        piece = self.piece
        return 0.0 if piece is None else max(0.0, time.monotonic() - piece.began_at)


class _During:
    def __init__(self, heartbeat: Heartbeat, piece: Piece) -> None:
        self._heartbeat = heartbeat
        self._piece = piece

    def __enter__(self) -> None:
        self._heartbeat.piece = self._piece

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._heartbeat.piece = None

"""Configures structlog once for the process: lines for people on a terminal, JSON for machines, always on standard error.

Nobody waits for a line, and none is worth a request: what cannot be written, to a full disk or a pipe whose reader has gone, is
counted and forgotten.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from typing import TextIO, cast

import structlog

__all__ = ["configure_logs", "let_go_of_stderr", "lost_lines"]


def configure_logs(log_format: str, log_level: str) -> None:
    """Sets format (`console` or `json`) and least severity."""
    # Serving TorchScript archives is what we are for; that torch deprecates them is nothing an operator can act on.
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The pretty tracebacks print local variables, and those hold images.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Lines(sys.stderr))),
        cache_logger_on_first_use=False,
    )


def lost_lines() -> int:
    """Lines of this process that could not be written."""
    return _Lines.lost


def let_go_of_stderr() -> None:
    """To be called last: Python would write once more what others could not, and end with another status when that fails."""
    try:
        sys.stderr.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class _Lines:
    """A stream for whole lines, each written at once.

    Past the buffer of standard error, which would keep what could not be written and put it before the next line.
    """

    lost = 0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        self._raw = raw if isinstance(raw, io.RawIOBase) else None
        self._line = ""

    def write(self, text: str) -> int:
        """Adds to the line; the logger's lock is held from here to `flush`."""
        self._line += text
        return len(text)

    def flush(self) -> None:
        """Writes the line."""
        line, self._line = self._line, ""
        try:
            if self._raw is None:
                self._stream.write(line)
                self._stream.flush()
            else:
                _write_all(self._raw, memoryview(line.encode("utf-8", "backslashreplace")))
        except (OSError, ValueError):  # A stream that was closed is a ValueError.
            _Lines.lost += 1


def _write_all(raw: io.RawIOBase, left: memoryview) -> None:
    while left:
        count = raw.write(left)
        if count is None:
            raise BlockingIOError("standard error is full, and does not wait")
        left = left[count:]

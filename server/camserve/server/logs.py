"""Configures structlog once for the process: lines for people on a terminal, JSON for machines, always on standard error."""

from __future__ import annotations

import logging
import sys
import warnings

import structlog

__all__ = ["configure_logs"]


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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )

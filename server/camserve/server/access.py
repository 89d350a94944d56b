"""One record for each call: opened by the interceptor, filled in by the servicer, written as one log line when the call ends."""

from __future__ import annotations

import contextvars
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import TypeVar

import structlog

from camserve.server.metrics import Metrics
from camserve.server.tracing import UNTRACED, RequestTrace

__all__ = ["AccessRecord", "current_record", "is_ordinary", "open_record"]

_T = TypeVar("_T")

_log = structlog.get_logger("camserve.access")
# Calls that ask for a prediction and explanations, of either protocol.
_REQUESTS = ("/Explain", "/ModelInfer")
_PROBES = ("/ServerLive", "/ServerReady", "/ModelReady")
_current: contextvars.ContextVar[AccessRecord] = contextvars.ContextVar("camserve_access_record")


@dataclasses.dataclass(slots=True, kw_only=True)
class AccessRecord:
    """What is known about a call so far. Never holds image bytes or metadata values.

    Attributes:
        rpc: full method name.
        peer: address of the caller.
        caller: its name; empty where it is that of an address, which `peer` tells.
        started_at: monotonic seconds.
        request_id: the caller's or ours; empty until the request was read.
        deadline: monotonic seconds after which nobody waits for the call, infinity if unknown.
        model: name of the model, only once it is known to exist, so that label values stay bounded.
        version: likewise.
        lane: how urgent the caller said it is.
        specs: number of explanations asked for.
        batch_rows: rows of the pass.
        code: gRPC status name.
        reason: of the error, or empty.
        message: of the error, or empty.
        trace: where the call is traced.
        is_streamed: whether it is one of the requests of a stream, which is a call of its own.
    """

    rpc: str
    peer: str
    caller: str = ""
    started_at: float = dataclasses.field(default_factory=time.monotonic)
    request_id: str = ""
    deadline: float = math.inf
    model: str = ""
    version: str = ""
    lane: str = ""
    specs: int = 0
    batch_rows: int = 0
    rules: int = 0
    code: str = "OK"
    reason: str = ""
    message: str = ""
    trace: RequestTrace = UNTRACED
    is_streamed: bool = False

    def close(self, metrics: Metrics) -> None:
        """Writes the line, counts the call and ends its span."""
        known: dict[str, str | int] = {
            "request_id": self.request_id,
            "model": self.model,
            "version": self.version,
            "lane": self.lane,
            "specs": self.specs,
            "batch_rows": self.batch_rows,
            "rules": self.rules,
        }
        self.trace.end(code=self.code, reason=self.reason, message=self.message, facts=_told(known))
        if self.is_streamed or self.rpc.endswith(_REQUESTS):
            metrics.requests.labels(self.model, self.version, self.code).inc()
        if self.code in {"UNAUTHENTICATED", "PERMISSION_DENIED"}:
            metrics.refused_callers.labels(self.reason).inc()
        fields: dict[str, str | float] = {
            "rpc": self.rpc,
            "code": self.code,
            "seconds": round(time.monotonic() - self.started_at, 6),
            "peer": self.peer,
            "caller": self.caller,
            "trace_id": self.trace.trace_id,
            **known,
            "reason": self.reason,
            "error": self.message,
        }
        write = _log.info if is_ordinary(self.rpc) else _log.debug
        write("call", **_told(fields))


def _told(fields: Mapping[str, _T]) -> dict[str, _T]:
    """What is known: a line says only what happened."""
    return {name: value for name, value in fields.items() if value not in ("", 0)}


def is_ordinary(rpc: str) -> bool:
    """Whether a call is no probe: those ask every few seconds, and would bury all others in logs and traces."""
    return rpc.startswith(("/camserve.", "/inference.")) and not rpc.endswith(_PROBES)


def open_record(record: AccessRecord) -> None:
    """Makes a record the current call's; grpc.aio runs each call in a context of its own."""
    _current.set(record)


def current_record() -> AccessRecord:
    """The current call's record."""
    return _current.get()

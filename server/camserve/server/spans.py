"""Traces as OpenTelemetry spans, sent by OTLP; `tracing.py` tells what arrives here and imports this only when it is asked for.

A call is a span with its stages as children. A pass belongs to several calls, so that it is the root of a trace of its own with a
link to each of them, and each has a child `device` that links back. What is told after the fact becomes a span with its times.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Self

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from camserve.server.errors import CamserveError
from camserve.server.jobs import Job, PassFacts, RawMap, SpecFailed

__all__ = ["OtlpTracer"]

_log = structlog.get_logger("camserve.tracing")

# A collector that answers takes milliseconds; one that is gone must not hold up the end of the process.
_FLUSH_SECONDS = 5.0
# By number, as gRPC counts them.
_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# The conventions for servers: what the caller did wrong is no error of ours.
_OUR_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
_W3C = TraceContextTextMapPropagator()
_W3C_KEYS = frozenset({"traceparent", "tracestate"})


class OtlpTracer:
    """Sends spans to where the standard variables say; reads them itself, sampler and limits included."""

    def __init__(self) -> None:
        _send_complaints_to_our_log()
        resource = Resource.create({SERVICE_VERSION: version("camserve")})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "camserve"}))
        self._exporter = OTLPSpanExporter()
        self._processor = BatchSpanProcessor(self._exporter)
        # Whether a pass is sampled follows from its members, which no sampler of the variables can know.
        self._requests, self._passes = (
            _tracer(TracerProvider(resource=resource, shutdown_on_exit=False), self._processor),
            _tracer(TracerProvider(resource=resource, shutdown_on_exit=False, sampler=ALWAYS_ON), self._processor),
        )

    def request(self, rpc: str, metadata: Iterable[tuple[str, str | bytes]]) -> _RequestSpan:
        """A span of the caller's trace if the metadata has a valid `traceparent`, else of a new one."""
        parent = _W3C.extract({key: value for key, value in metadata if key in _W3C_KEYS})
        method = rpc.removeprefix("/")
        service, _, name = method.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        clock = _Clock()
        span = self._requests.start_span(
            method, parent, SpanKind.SERVER, attributes, start_time=clock.nanoseconds(time.monotonic())
        )
        return _RequestSpan(self._requests, span, clock)

    def shared_pass(self, members: Sequence[object], model: str, version: str) -> _PassSpan:
        """A span of its own, if any of the requests is sampled."""
        sampled = [member for member in members if isinstance(member, _RequestSpan) and member.is_sampled]
        return _PassSpan(self._passes, sampled, {"camserve.model": model, "camserve.version": version})

    def close(self) -> None:
        """Sends what is left; gives up after a few seconds."""
        flushing = threading.Thread(target=self._processor.shutdown, name="camserve-flush", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_SECONDS)
        if flushing.is_alive():
            _log.warning("spans were lost: the collector did not take them in time")
            self._exporter.shutdown()


class _Clock:
    """Monotonic seconds as nanoseconds since 1970. Read once, so that spans of one tree fit even if the wall clock jumps."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, monotonic_seconds: float) -> int:
        return self._offset + int(monotonic_seconds * 1e9)


class _RequestSpan:
    def __init__(self, tracer: trace.Tracer, span: Span, clock: _Clock) -> None:
        self._tracer = tracer
        self._span = span
        self._clock = clock
        self._context = trace.set_span_in_context(span)
        self.is_sampled = span.is_recording()
        self.trace_id = trace.format_trace_id(span.get_span_context().trace_id)

    @property
    def span_context(self) -> SpanContext:
        return self._span.get_span_context()

    def stage(
        self, name: str, began_at: float, ended_at: float, error: BaseException | None = None, /, **facts: str | int
    ) -> None:
        self.child(name, began_at, ended_at, error, {f"camserve.{fact}": value for fact, value in facts.items()})

    def child(
        self,
        name: str,
        began_at: float,
        ended_at: float,
        error: BaseException | None,
        attributes: Mapping[str, str | int],
        links: Sequence[Link] = (),
    ) -> None:
        """A span that is over already."""
        if not self.is_sampled:
            return
        began, ended = self._clock.nanoseconds(began_at), self._clock.nanoseconds(ended_at)
        span = self._tracer.start_span(name, self._context, SpanKind.INTERNAL, attributes, links, start_time=began)
        _set_error(span, error)
        span.end(ended)

    def end(self, *, code: str, reason: str, message: str, facts: Mapping[str, str | int]) -> None:
        span = self._span
        span.set_attributes({f"camserve.{fact}": value for fact, value in facts.items()})
        if code in _CODES:
            span.set_attribute("rpc.grpc.status_code", _CODES.index(code))
        if code != "OK":
            span.set_attribute("error.type", reason or code)
        if code in _OUR_ERRORS:
            span.set_status(Status(StatusCode.ERROR, message or code))
        span.end(self._clock.nanoseconds(time.monotonic()))


class _PassSpan:
    """Starts a span only if there are members; without them there is nothing to tell."""

    def __init__(self, tracer: trace.Tracer, members: Sequence[_RequestSpan], attributes: Mapping[str, str]) -> None:
        self._tracer = tracer
        self._members = members
        self._attributes: dict[str, str | int | float] = dict(attributes)

    def __enter__(self) -> Self:
        self._clock = _Clock()
        self._began_at = time.monotonic()
        if self._members:
            links = [Link(member.span_context) for member in self._members]
            began = self._clock.nanoseconds(self._began_at)
            self._span = self._tracer.start_span("pass", Context(), links=links, start_time=began)
            self._context = trace.set_span_in_context(self._span)
        return self

    def mapped(self, job: Job, result: RawMap | SpecFailed) -> None:
        if not self._members:
            return
        now, took, error = time.monotonic(), 0.0, None
        attributes: dict[str, str | int] = {
            "camserve.request_id": job.request_id,
            "camserve.spec": result.spec_index,
            "camserve.method": job.specs[result.spec_index].method,
        }
        if isinstance(result, RawMap):
            took = result.device_seconds
            attributes |= {"camserve.layers": ",".join(result.layers), "camserve.rank": result.target.rank}
        else:
            error = result.error
        span = self._tracer.start_span(
            "method", self._context, attributes=attributes, start_time=self._clock.nanoseconds(now - took)
        )
        _set_error(span, error)
        span.end(self._clock.nanoseconds(now))

    def closed(self, facts: PassFacts, map_seconds: float, depth: int) -> None:
        self._attributes |= {
            "camserve.rows": facts.rows,
            "camserve.explanations": facts.explanations,
            "camserve.plan": facts.plan,
            "camserve.depth": depth,
            "camserve.device": facts.device,
            "camserve.forward_seconds": facts.forward_seconds,
            "camserve.backward_seconds": facts.backward_seconds,
            "camserve.map_seconds": map_seconds,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._members:
            return
        ended_at = time.monotonic()
        self._span.set_attributes(self._attributes)
        _set_error(self._span, error)
        self._span.end(self._clock.nanoseconds(ended_at))
        link = Link(self._span.get_span_context())
        for member in self._members:
            member.child("device", self._began_at, ended_at, error, {}, [link])


def _tracer(provider: TracerProvider, processor: BatchSpanProcessor) -> trace.Tracer:
    provider.add_span_processor(processor)
    return provider.get_tracer("camserve", version("camserve"))


def _set_error(span: Span, error: BaseException | None) -> None:
    if error is None:
        return
    span.set_attribute("error.type", str(error.reason) if isinstance(error, CamserveError) else type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, str(error)))


class _ToOurLog(logging.Handler):
    """The library complains through Python's logging; here it becomes lines like all others."""

    def emit(self, record: logging.LogRecord) -> None:
        _log.warning("tracing", said=record.getMessage())


def _send_complaints_to_our_log() -> None:
    theirs = logging.getLogger("opentelemetry")
    if not any(isinstance(handler, _ToOurLog) for handler in theirs.handlers):
        theirs.addHandler(_ToOurLog(logging.WARNING))
        theirs.propagate = False

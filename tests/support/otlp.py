"""A collector of spans: a real OTLP receiver on a port of its own, which keeps what it is sent."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

__all__ = ["Collector", "Span", "collecting"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A span as it was sent; ids as hexadecimal digits, times in nanoseconds since 1970."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[tuple[str, str], ...]
    attributes: dict[str, Any]
    resource: dict[str, Any]
    status: str
    message: str
    began: int
    ended: int

    @property
    def place(self) -> tuple[str, str]:
        """What a link to it holds."""
        return self.trace_id, self.span_id


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes whatever comes."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._came = threading.Condition()
        self.endpoint = ""

    def Export(  # noqa: N802 - the name is the contract's
        self, request: trace_service_pb2.ExportTraceServiceRequest, _context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Keeps the spans of one export."""
        with self._came:
            for sent in request.resource_spans:
                resource = _attributes(sent.resource.attributes)
                for scope in sent.scope_spans:
                    self._spans += [_span(span, resource) for span in scope.spans]
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[Span]:
        """All that came so far."""
        with self._came:
            return list(self._spans)

    def wait_for(self, is_complete: Callable[[list[Span]], bool], timeout_seconds: float = 180) -> list[Span]:
        """Returns all spans as soon as they are complete."""
        with self._came:
            if not self._came.wait_for(lambda: is_complete(self._spans), timeout_seconds):
                raise AssertionError(f"these came, and no more: {[span.name for span in self._spans]}")
            return list(self._spans)


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens inside the `with` block."""
    collector = Collector()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield collector
    server.stop(None).wait()


def _span(span: trace_pb2.Span, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        attributes=_attributes(span.attributes),
        resource=resource,
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        message=span.status.message,
        began=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    return getattr(value, str(value.WhichOneof("value")))

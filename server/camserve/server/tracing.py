"""What the stages tell about a request so that it can be traced, and the tracer that tells nobody.

The interceptor opens a request's trace, the pipeline tells its stages, the runner its passes and chunks. `spans.py` makes spans
of that; it is imported only when the standard environment variables ask for it, and otherwise everything here does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from camserve.server.jobs import Job, PassFacts, RawMap, SpecFailed

__all__ = ["UNTRACED", "PassTrace", "RequestTrace", "Tracer", "tracer_of"]


class RequestTrace(Protocol):
    """One call's part in a trace. Times are monotonic seconds; any thread may tell."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, or empty."""
        ...

    def stage(
        self, name: str, began_at: float, ended_at: float, error: BaseException | None = None, /, **facts: str | int
    ) -> None:
        """Something was done for this call alone."""
        ...

    def end(self, *, code: str, reason: str, message: str, facts: Mapping[str, str | int]) -> None:
        """The call is over: its gRPC status by name, why it failed, and what else is known of it."""
        ...


class PassTrace(contextlib.AbstractContextManager["PassTrace"], Protocol):
    """One pass, from entering the `with` block to leaving it, or to the error that ends it; device thread."""

    def mapped(self, job: Job, result: RawMap | SpecFailed, /) -> None:
        """One of its maps was made just now, or failed."""
        ...

    def closed(self, facts: PassFacts, map_seconds: float, depth: int, /) -> None:
        """What the pass was: its facts, seconds spent on maps, and how deep its gradients went."""
        ...


class Tracer(Protocol):
    """Makes traces."""

    def request(self, rpc: str, metadata: Iterable[tuple[str, str | bytes]], /) -> RequestTrace:
        """Opens the trace of a call, as part of its caller's if the metadata says so."""
        ...

    def shared_pass(self, members: Sequence[RequestTrace], model: str, version: str, /) -> PassTrace:
        """Opens the trace of a pass that these requests share."""
        ...

    def close(self) -> None:
        """Sends what has not been sent yet, for a few seconds at most; blocks."""
        ...


class _Untraced:
    """Request, pass and tracer in one, since all of them do nothing."""

    trace_id = ""

    def request(self, _rpc: str, _metadata: Iterable[tuple[str, str | bytes]], /) -> Self:
        return self

    def shared_pass(self, _members: Sequence[RequestTrace], _model: str, _version: str, /) -> Self:
        return self

    def stage(
        self,
        _name: str,
        _began_at: float,
        _ended_at: float,
        _error: BaseException | None = None,
        /,
        **_facts: str | int,
    ) -> None:
        """Nobody asks."""

    def mapped(self, _job: Job, _result: RawMap | SpecFailed, /) -> None:
        """Nobody asks."""

    def closed(self, _facts: PassFacts, _map_seconds: float, _depth: int, /) -> None:
        """Nobody asks."""

    def end(self, *, code: str, reason: str, message: str, facts: Mapping[str, str | int]) -> None:
        """Nobody asks."""

    def close(self) -> None:
        """Nothing is left to be sent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


UNTRACED = _Untraced()


def tracer_of(environ: Mapping[str, str]) -> Tracer:
    """The tracer that the standard variables ask for: off, unless an OTLP endpoint or exporter is named.

    Raises:
        ValueError: what they ask for cannot be done here; the text names the variable.
    """
    if not _is_asked_for(environ):
        return UNTRACED
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if protocol != "grpc":
        raise ValueError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}, but camserve exports traces by grpc only; unset it, and name the "
            "collector's gRPC port, usually 4317"
        )
    try:
        from camserve.server.spans import OtlpTracer  # noqa: PLC0415 - nobody else pays for it
    except ModuleNotFoundError as error:
        raise ValueError(
            f"OTEL_ variables ask for traces, which need a package that is not installed ({error.name}); "
            "pip install 'camserve[tracing]', or set OTEL_SDK_DISABLED=true"
        ) from error
    return OtlpTracer()


def _is_asked_for(environ: Mapping[str, str]) -> bool:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter not in {"", "otlp", "none"}:
        raise ValueError(
            f"OTEL_TRACES_EXPORTER is {exporter}, but camserve exports traces by otlp only; say otlp or none"
        )
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return exporter == "otlp" or (not exporter and bool(endpoint))

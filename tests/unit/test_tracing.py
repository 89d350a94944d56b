"""When the standard variables ask for traces, and what is said if they ask for what cannot be done."""

from __future__ import annotations

import pytest

from camserve.server.spans import OtlpTracer
from camserve.server.tracing import UNTRACED, tracer_of

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "camserve"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_TRACES_EXPORTER": "none"},
        ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
        ENDPOINT | {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "TRUE"},
    ],
    ids=str,
)
def test_off(environ):
    """Nothing is traced unless it is asked for, nor when it is forbidden."""
    assert tracer_of(environ) is UNTRACED


@pytest.mark.parametrize(
    "environ",
    [
        ENDPOINT,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4317"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
        ENDPOINT | {"OTEL_SDK_DISABLED": "false", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
    ids=str,
)
def test_on(environ):
    """An endpoint or the exporter's name suffices."""
    tracer = tracer_of(environ)

    assert isinstance(tracer, OtlpTracer)
    tracer.close()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is zipkin, .* say otlp or none"),
        ({"OTEL_TRACES_EXPORTER": "otlp,console"}, "OTEL_TRACES_EXPORTER is otlp,console"),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "by grpc only; unset it, .* usually 4317"),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "is http/json"),
    ],
)
def test_what_cannot_be_done_is_refused(environ, said):
    """A server that was asked to trace and does not would be found out on the day it is needed."""
    with pytest.raises(ValueError, match=said):
        tracer_of(environ)

from __future__ import annotations

import json

import pytest
import structlog

from camserve.server import logs
from camserve.server.access import AccessRecord
from camserve.server.metrics import Metrics

IMAGE = b"\xff\xd8\xffthese bytes are an image"


@pytest.fixture(autouse=True)
def _restore():
    """Logging is configured once for a process; other tests start from where they were."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def fail_with(image: bytes) -> None:
    """Raises from a frame that holds an image."""
    size = len(image)
    raise ZeroDivisionError(f"no good: {size} bytes")


def log_a_failure() -> None:
    """Logs an exception whose frames hold an image."""
    try:
        fail_with(IMAGE)
    except ZeroDivisionError as error:
        structlog.get_logger().exception("unexpected error", request_id="r-1", exc_info=error)


def test_json_lines_parse(capsys):
    """One object a line, with time, level and everything that was said, also in other scripts and with line breaks."""
    logs.configure_logs("json", "info")

    structlog.get_logger().info("call", error="zwei\nZeilen „Ä“", seconds=0.25, layers=("a", "b"))
    structlog.get_logger().warning("row failed", error=ValueError("no"))

    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert ("call", "info", "zwei\nZeilen „Ä“", 0.25) == tuple(
        first[key] for key in ("event", "level", "error", "seconds")
    )
    assert first["timestamp"].endswith("Z")
    assert ("row failed", "warning", "ValueError('no')") == tuple(second[key] for key in ("event", "level", "error"))


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_have_no_local_variables(capsys, log_format):
    """Frames hold images; a traceback tells files and lines, and the message."""
    logs.configure_logs(log_format, "info")

    log_a_failure()

    text = capsys.readouterr().err
    assert "fail_with" in text
    assert "no good: 27 bytes" in text
    assert "these bytes are an image" not in text
    assert "size = " not in text.replace("size = len(image)", "")


def test_a_traceback_is_one_json_line(capsys):
    """Machines read line by line."""
    logs.configure_logs("json", "info")

    log_a_failure()

    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError" in json.loads(line)["exception"]


def test_less_severe_lines_are_left_out(capsys):
    """The level is the least that is written."""
    logs.configure_logs("json", "warning")

    structlog.get_logger().info("quiet")
    structlog.get_logger().error("loud")

    assert ["loud"] == [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]


def test_nothing_goes_to_standard_output(capsys):
    """It belongs to whoever pipes."""
    logs.configure_logs("console", "info")

    structlog.get_logger().info("call")

    assert "" == capsys.readouterr().out


def test_a_call_is_one_line_with_what_is_known(capsys):
    """Empty fields are left out, so that a line says only what happened."""
    logs.configure_logs("json", "info")
    record = AccessRecord(rpc="/camserve.v1.ExplanationService/Explain", peer="ipv4:127.0.0.1:1", request_id="r-1")
    record.model, record.version, record.specs = "surface", "1", 2
    metrics = Metrics()

    record.close(metrics)

    line = json.loads(capsys.readouterr().err)
    assert {"rpc", "code", "seconds", "peer", "request_id", "model", "version", "specs"} == line.keys() - {
        "event",
        "level",
        "timestamp",
    }
    labels = {"model": "surface", "version": "1", "code": "OK"}
    assert 1 == metrics.registry.get_sample_value("camserve_requests_total", labels)

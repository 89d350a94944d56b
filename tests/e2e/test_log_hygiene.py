"""What a real process writes to its log: never what callers keep to themselves, and never at the cost of a request."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image, PngImagePlugin
from support.fragile import MARK
from support.otlp import collecting
from support.servers import until

from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import explanation_service_pb2_grpc, input_pb2, model_service_pb2, model_service_pb2_grpc, spec_pb2

SERVE = [
    *(sys.executable, "-W", "ignore", str(Path(sys.executable).with_name("camserve")), "serve"),
    *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--drain-delay-seconds", "0"),
]
TESTS = str(Path(__file__).parents[1])
SECRET = b"hush"
METADATA = [
    ("authorization", "Bearer hush-token"),
    ("x-api-key", "hush-key"),
    ("cookie", "session=hush-cookie"),
    ("baggage", "user=hush-user"),
    ("traceparent", f"00-{7:032x}-{7:016x}-01"),
    ("tracestate", "vendor=hush-state"),
    ("secret-bin", b"hush-binary"),
]
GREEDY = """
default_layer = "body"
[factory]
name = "support.fragile:greedy"
allowed_imports = ["support.fragile"]
random_seed = 0
[input]
size = [32, 32]
"""


@contextlib.contextmanager
def process(
    *flags: str, environment: Mapping[str, str] = os.environ, **pipes: object
) -> Iterator[subprocess.Popen[bytes]]:
    """`camserve serve`, killed at the end if it still runs."""
    running = subprocess.Popen([*SERVE, *flags], env=dict(environment), **pipes)  # noqa: S603 - our own command
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def page(port: int, path: str) -> tuple[int, str]:
    """Status and text of a page; 0 where no such server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""
    except (OSError, http.client.HTTPException):
        return 0, ""


async def ports_of(running: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Both ports of a server that cannot tell them, once it is ready."""

    def listening() -> list[int]:
        assert running.poll() is None, f"it ended with {running.returncode}"
        connections = psutil.Process(running.pid).net_connections("tcp")
        return [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]

    await until(lambda: len(listening()) == 2, 120)
    ours = listening()
    await until(lambda: any(page(port, "/readyz")[0] == 200 for port in ours), 120)
    (pages,) = [port for port in ours if page(port, "/readyz")[0] == 200]
    return next(port for port in ours if port != pages), pages


def explained(channel: grpc.Channel, asked: service_pb2.ExplainRequest, timeout: float = 60) -> grpc.StatusCode:
    """Asks with all secrets in the metadata; how it ended."""
    call = explanation_service_pb2_grpc.ExplanationServiceStub(channel).Explain(
        asked, metadata=METADATA, timeout=timeout
    )
    with contextlib.suppress(grpc.RpcError):
        list(call)
    return call.code()


def tensor(values: np.ndarray) -> input_pb2.Tensor:
    """An array as it is sent."""
    array = np.asarray(values, np.float32)
    return input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=array.tobytes())


def picture(kind: str) -> bytes:
    """A good picture with the secret in its pixels and its comment."""
    pixels = np.frombuffer(SECRET * (96 * 96 * 3 // len(SECRET)), np.uint8).reshape(96, 96, 3)
    said = PngImagePlugin.PngInfo()
    said.add_text("Comment", "hush-comment")
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"pnginfo": said} if kind == "PNG" else {"comment": b"hush-comment"}))
    return file.getvalue()


def requests() -> Iterator[tuple[service_pb2.ExplainRequest, grpc.StatusCode]]:
    """Good ones and bad ones of each kind, all full of secrets, and how each must end."""
    ok, invalid = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT
    hushed = np.frombuffer(SECRET * (3 * 32 * 32), np.float32).reshape(3, 32, 32)
    marked = np.full((3, 32, 32), MARK, np.float32)
    marked[0] = hushed[0]
    frame = input_pb2.RawFrame(pixel_format=input_pb2.PIXEL_FORMAT_RGB8, width_pixels=32, height_pixels=32)
    inputs: list[tuple[dict[str, object], grpc.StatusCode]] = [
        ({"image": {"data": picture("PNG")}}, ok),
        ({"image": {"data": picture("JPEG")}}, ok),
        ({"image": {"data": picture("PNG")[:-200]}}, invalid),
        ({"image": {"data": picture("PNG").replace(b"IDAT", b"hush")}}, invalid),
        ({"image": {"data": b"\xff\xd8\xff" + SECRET * 100}}, invalid),
        ({"image": {"data": SECRET * 100}}, invalid),
        ({"image": {"data": b"RIFF" + SECRET + b"WEBP" + SECRET * 100}}, invalid),
        ({"image": {"data": b"II*\x00\x08\x00\x00\x00" + SECRET * 100}}, invalid),
        ({"frame": input_pb2.RawFrame(data=SECRET * 3, **_fields(frame))}, invalid),
        ({"tensor": tensor(hushed / hushed.max())}, ok),
        ({"tensor": tensor(hushed[:, :5])}, invalid),
        ({"tensor": tensor(np.where(hushed > 0, np.nan, 1))}, invalid),
        ({"tensor": input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=(3, 32, 32), data=SECRET)}, invalid),
        ({"tensor": tensor(marked), "labels": {"order": "hush-order"}}, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ({"tensor": tensor(hushed), "extra_inputs": {"mask": tensor(hushed)}}, invalid),
    ]
    for given, status in inputs:
        spec = spec_pb2.Spec(method=spec_pb2.METHOD_GRAD_CAM)
        fields = {"labels": {"caller": "hush-caller"}, **given}
        yield service_pb2.ExplainRequest(model="greedy", specs=[spec], **fields), status


def _fields(message: input_pb2.RawFrame) -> dict[str, object]:
    return {field.name: value for field, value in message.ListFields()}


def test_secrets_and_pixels_reach_neither_log_nor_traces(tmp_path):
    """At the most talkative level, for good and for bad requests, in plain text, hexadecimal or base64."""
    folder = tmp_path / "models" / "greedy"
    (folder / "1").mkdir(parents=True)
    (folder / "model.toml").write_text(GREEDY, encoding="utf-8")
    log = tmp_path / "log"
    with collecting() as collector:
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
        environment["OTEL_EXPORTER_OTLP_HEADERS"] = "api-key=hush-collector"
        flags = ["--models", str(tmp_path / "models"), "--log-level", "debug", "--log-format", "json"]
        with log.open("wb") as stderr, process(*flags, environment=environment, stderr=stderr) as running:
            (port,) = waited_for(log, running)
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                ended = [(status, explained(channel, asked)) for asked, status in requests()]
                late = explained(channel, next(requests())[0], timeout=0.001)
                model_service_pb2_grpc.ModelServiceStub(channel).ListModels(
                    model_service_pb2.ListModelsRequest(), metadata=METADATA
                )
            running.send_signal(signal.SIGTERM)
            assert 0 == running.wait(timeout=180)
        traces = repr(collector.spans())

    assert [expected for expected, _ in ended] == [status for _, status in ended]
    # Refused if it is known by now that so little time cannot suffice.
    assert late in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
    text = log.read_text(encoding="utf-8")
    # Those and ListModels; a thousandth of a second may be over before the late one has reached the server.
    assert len(ended) + 1 <= len(re.findall('"event": "call"', text))
    assert "row failed" in text
    assert "IMAGE_UNDECODABLE" in traces
    value = repr(float(np.frombuffer(SECRET, np.float32)[0]))
    for told in (text, traces):
        assert "hush" not in told
        assert SECRET.hex() not in told.lower()
        assert value[:6] not in told
        assert [] == [code for code in encoded(SECRET * 4) if code in told]


def encoded(secret: bytes) -> list[str]:
    """The middle of its base64, which depends on where it stands."""
    return [base64.b64encode(b"x" * place + secret)[6:14].decode() for place in range(3)]


def waited_for(log: Path, running: subprocess.Popen[bytes]) -> list[int]:
    """The gRPC port that the log tells."""
    while not (found := re.findall(r"ready on port (\d+) with", log.read_text(encoding="utf-8"))):
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended with {running.wait(timeout=0.05)}:\n{log.read_text(encoding='utf-8')}")
    return [int(port) for port in found]


async def answers_on(port: int, pages: int) -> None:
    """Requests, good ones and bad ones, are answered as ever; the page counts the lines that were lost."""
    before = lost_lines(pages)
    row = service_pb2.ExplainRequest(
        model="surface", specs=[{"method": spec_pb2.METHOD_GRAD_CAM}], tensor=tensor(np.zeros((3, 160, 160)))
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = explanation_service_pb2_grpc.ExplanationServiceStub(channel).Explain
        for _ in range(5):
            assert 3 == len([message async for message in call(row, timeout=60)])
            with pytest.raises(grpc.aio.AioRpcError, match="is not on this server"):
                [message async for message in call(service_pb2.ExplainRequest(model="no"), timeout=60)]
    await until(lambda: lost_lines(pages) >= before + 10)


def lost_lines(pages: int) -> float:
    """As the metrics page counts them."""
    found = re.search(r"^camserve_log_failures_total (\S+)$", page(pages, "/metrics")[1], re.MULTILINE)
    assert found is not None
    return float(found[1])


async def test_a_full_disk_for_logs_costs_lines_not_requests():
    """Both standard streams on a device that is always full: served, counted, and ended with 0."""
    full = os.open("/dev/full", os.O_WRONLY)
    with process("--log-format", "json", stdout=full, stderr=full) as running:
        os.close(full)
        await answers_on(*await ports_of(running))
        running.send_signal(signal.SIGTERM)

        assert 0 == running.wait(timeout=180)


async def test_a_log_reader_that_leaves_costs_lines_not_requests():
    """Whoever reads our standard error ends while we serve: likewise."""
    with process(stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        found = None
        while found is None:
            line = running.stderr.readline().decode()
            assert line, f"it ended with {running.wait()}"
            found = re.search(r"ready on port (\d+) .*metrics on port (\d+)", line)
        running.stderr.close()
        await answers_on(int(found[1]), int(found[2]))
        running.send_signal(signal.SIGTERM)

        assert 0 == running.wait(timeout=180)

"""Starting, being well, being looked at, and stopping: the server as operations see it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.servers import Metrics

from camserve.client import AsyncClient, Spec, TensorInput, Unavailable

CAMSERVE = str(Path(sys.executable).with_name("camserve"))
ROW = TensorInput(np.zeros((3, 160, 160), np.float32))


@pytest.fixture
def channel(demo_server):
    """A bare channel to the demo server."""
    with grpc.insecure_channel(demo_server.target) as channel:
        yield channel


@pytest.mark.parametrize(
    "service", ["", "camserve.v1.ExplanationService", "camserve.v1.ModelService", "camserve/surface"]
)
def test_health(channel, service):
    """The server, its services and each model answer SERVING."""
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))

    assert health_pb2.HealthCheckResponse.SERVING == answer.status


def test_health_of_unknown_name(channel):
    """An unknown name is NOT_FOUND, as the protocol says."""
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="camserve/nothing"))

    assert grpc.StatusCode.NOT_FOUND == caught.value.code()


def test_health_watch(channel):
    """Watch sends the state at once."""
    updates = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="camserve/surface"))
    first = next(updates)
    updates.cancel()

    assert health_pb2.HealthCheckResponse.SERVING == first.status


def test_reflection(channel):
    """Generic clients can learn the services and the request's fields."""
    database = ProtoReflectionDescriptorDatabase(channel)

    assert {"camserve.v1.ExplanationService", "camserve.v1.ModelService", "grpc.health.v1.Health"} <= set(
        database.get_services()
    )
    file = database.FindFileContainingSymbol("camserve.v1.ExplainRequest")
    assert "specs" in {
        field.name for message in file.message_type if message.name == "ExplainRequest" for field in message.field
    }


def test_models_and_card(client):
    """The list tells what is ready; the card tells layers, methods and digests."""
    (status,) = client.models()
    card = client.model("surface")

    assert ("surface", "1", "ready") == (status.name, status.version, status.state)
    assert ("good", "scratch", "spot", "crack", "stain") == tuple(card.labels)
    assert card.default_layer in {layer.name for layer in card.layers}
    assert ["legrad", "attention-rollout"] == [method.method for method in card.methods if not method.works]
    assert re.fullmatch("[0-9a-f]{64}", card.model_sha256)
    assert card.rows_independent


def test_metrics_page_after_traffic(demo_server, client, samples):
    """Every stage that a request passes leaves its mark on the metrics page."""
    metrics = Metrics(demo_server)
    names = [
        "camserve_requests_total|code=OK",
        "camserve_explanations_total|method=grad-cam|outcome=ok",
        "camserve_decode_seconds_count",
        "camserve_queue_seconds_count",
        "camserve_batch_rows_sum",
        "camserve_explanations_per_pass_sum",
        "camserve_pass_seconds_count|phase=forward",
        "camserve_pass_seconds_count|phase=backward",
        "camserve_pass_seconds_count|phase=maps",
        "camserve_encode_seconds_count|encoding=uint8",
        "camserve_first_message_seconds_count",
        "camserve_request_seconds_count",
    ]

    def read() -> list[float]:
        return [
            metrics.value(name, **dict(label.split("=") for label in labels))
            for name, *labels in (entry.split("|") for entry in names)
        ]

    before = read()
    client.explain(samples[0], model="surface", specs=["grad-cam"])

    assert [1.0] * len(names) == [now - then for now, then in zip(read(), before, strict=True)]


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """`camserve serve` on free ports: the process, its port and its metrics port. The last test here ends it."""
    flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--drain-delay-seconds", "0"]
    process = subprocess.Popen(  # noqa: S603 - our own command
        [CAMSERVE, "serve", *flags, "--log-format", "json"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process:
        try:
            for line in process.stderr:
                if match := re.search(r"ready on port (\d+) .*metrics on port (\d+)", line):
                    yield process, int(match[1]), int(match[2])
                    break
            else:
                raise AssertionError(f"the server ended with {process.wait()} before it was ready")
        finally:
            process.kill()


def test_metrics_page_of_a_process(started):
    """`camserve serve` opens the metrics page, and it names the build."""
    _, _, metrics_port = started
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=60) as answer:
        page = answer.read().decode()

    assert "camserve_build_info{" in page
    assert 'camserve_model_ready{model="surface",version="1"} 1.0' in page


def test_sigterm_answers_everybody_let_in(started):
    """SIGTERM under load: every request let in is answered, new ones are told to go elsewhere, the process ends with 0."""
    process, port, _ = started
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()

    async def run():
        async with AsyncClient(f"127.0.0.1:{port}", retries=0) as client:
            await client.explain(ROW, model="surface")
            calls = [asyncio.create_task(first_then_rest(client)) for _ in range(16)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*calls, return_exceptions=True)

    async def first_then_rest(client):
        return await client.explain(ROW, model="surface", specs=["grad-cam", Spec("layercam", layers=["layer2"])])

    results = asyncio.run(run())
    status = process.wait(timeout=180)
    reader.join()

    assert 0 == status
    lost = [result for result in results if isinstance(result, Exception) and not isinstance(result, Unavailable)]
    assert not lost
    answered = [result for result in results if not isinstance(result, Exception)]
    assert answered
    assert all(len(result.heatmaps) == 2 for result in answered)
    calls = [record for record in map(json.loads, lines) if record["event"] == "call"]
    assert len(answered) + 1 == sum(record["code"] == "OK" for record in calls)


def test_a_server_imports_only_what_it_needs():
    """Neither tracing that nobody asked for nor torch's compiler, which takes as long to import as all the rest of torch."""
    script = """
import sys
import numpy as np
from camserve.client import Client, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.models.sources import demo_sources
from camserve.server.settings import Settings

settings = Settings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", drain_delay_seconds=0)
with BackgroundServer(settings, demo_sources()) as server, Client(server.target, timeout=120) as client:
    client.explain(TensorInput(np.zeros((3, 160, 160), np.float32)), model="surface", specs=["grad-cam"])
heavy = ("opentelemetry", "torch._dynamo", "torch._inductor", "sympy", "torchvision")
print(sorted(name for name in sys.modules if name in heavy))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True, env=environment
    )

    assert "[]\n" == done.stdout


@pytest.mark.parametrize("kind", ["port", "socket"])
def test_an_address_that_cannot_be_had_is_told_with_the_reason(kind, tmp_path):
    """The system's words, not how to debug gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}" if kind == "port" else f"unix:{tmp_path / 'absent' / 'socket'}"
        done = subprocess.run(  # noqa: S603 - our own command
            [CAMSERVE, "serve", "--listen", address, "--metrics-listen", ""],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    why = "Address already in use" if kind == "port" else "no socket can be made there"
    assert 1 == done.returncode
    assert f"Error: cannot listen: listen {address}: {why}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "nothing.pt"], "nothing.pt does not exist"),
        (["--models", "no/such/folder"], "is not a folder"),
        (["--device", "tpu"], "not a device"),
        (["--listen", "nonsense"], "not an address"),
    ],
)
def test_serve_refuses_wrong_flags(flags, said):
    """A wrong flag ends the command with a line that tells what would be right."""
    done = subprocess.run(  # noqa: S603 - our own command
        [CAMSERVE, "serve", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )

    assert 0 != done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr

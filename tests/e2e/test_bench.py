"""`camserve bench` and the load generator under it, against real servers with small models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.gated import GATE, gated_source
from support.nets import TinyNet
from support.servers import script_source

from camserve.client import TensorInput
from camserve.client.bench import Closed, Connections, Mix, Open, Window, figures_of, input_bytes, kind, run_step
from camserve.server.background import BackgroundServer

TENSOR = TensorInput(np.ones((3, 32, 32), np.float32))


@pytest.fixture
def tiny(serve: Callable[..., BackgroundServer], tmp_path: Path) -> BackgroundServer:
    """A server of TinyNet."""
    return serve(script_source("tiny", TinyNet(), tmp_path))


def bench(server: BackgroundServer, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, as a user does."""
    return subprocess.run(  # noqa: S603 - ours
        [str(Path(sys.executable).with_name("camserve")), "bench", "--server", server.target, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_sweep_of_the_demo_model(demo_server, samples, tmp_path):
    """Files, two kinds of request, a comparison with predictions: tables, JSON and page tell of the model that was served."""
    done = bench(
        demo_server,
        tmp_path,
        *(str(path) for path in samples[:3]),
        *("-m", "grad-cam@layer2=2", "-m", "eigen-cam,layercam", "--concurrency", "1,4"),
        *("--requests", "8", "--warm-up", "0"),
        *("--baseline", "--rounds", "2", "--target-ms", "60000", "--json", "run.json", "--html", "run.html"),
    )

    assert (0, "") == (done.returncode, "" if done.returncode == 0 else done.stderr)
    run = json.loads((tmp_path / "run.json").read_text())
    assert ("surface", "torchscript", "cpu") == tuple(run["model"][key] for key in ("name", "kind", "device"))
    assert 64 == len(run["model"]["sha256"])
    assert ["mix", "prediction"] * 2 == [step["asked"] for step in run["steps"]]
    for step in run["steps"]:
        assert (8, 8, 8, []) == (step["due"], step["answered"], step["good"], step["errors"])
        assert step["stage_seconds"]["forward"] > 0
    explained, predicted = (run["steps"][index]["stage_seconds"] for index in (0, 1))
    assert explained["backward"] + explained["maps"] > predicted["backward"] + predicted["maps"]
    assert all(comparison["time_ratio"]["median"] > 0 for comparison in run["comparisons"])
    assert "a bare prediction" in done.stdout
    assert "</html>" in (tmp_path / "run.html").read_text()


def test_refused_specs_are_told_before_the_load(tiny, tmp_path):
    """A layer that does not exist is refused by the server once, and the command says so and ends."""
    done = bench(tiny, tmp_path, "-m", "grad-cam@layer9")

    assert 1 == done.returncode
    assert "the server refuses to answer grad-cam@layer9: LAYER_NOT_FOUND" in done.stderr


async def test_callers_share_passes(tiny):
    """The figures tell of real batches, of both messages of an answer, and of nothing that failed."""
    mix = Mix(kinds=(kind("tiny", ["grad-cam"]), kind("tiny", [])), inputs=(input_bytes(TENSOR),))

    async with Connections(tiny.target, count=2) as connections:
        figures = figures_of(await run_step(connections, mix, Closed(6), Window(requests=60, warm_up_seconds=0.1)))

    assert (60, 60, {}) == (figures.due, figures.answered, figures.errors)
    assert figures.batch_rows is not None
    assert 1 < figures.batch_rows <= 6
    assert figures.first_latency is not None
    assert figures.latency is not None
    assert 0 < figures.first_latency.p50 <= figures.latency.p50
    assert {0, 1} == set(figures.by_kind)
    assert 0 < figures.explained_per_second < figures.requests_per_second


async def test_a_server_that_is_too_slow_shows_it(serve):
    """Latency counts from when a request was due: behind a model that waits, deadlines pass and refusals are recorded.

    The model's backward waits for a gate that never opens before the deadline; the door has room for four.
    """
    GATE.reset()
    GATE.opened.set()
    server = serve(gated_source(), max_requests=4)
    GATE.reset()
    mix = Mix(kinds=(kind("gated", ["grad-cam"], deadline=0.5),), inputs=(input_bytes(TENSOR),))

    async with Connections(server.target) as connections:
        step = await run_step(connections, mix, Open(100.0), Window(requests=30))
        GATE.opened.set()

    figures = figures_of(step, target_seconds=0.5)
    told = {(record.code, record.reason) for record in step.records}
    assert {("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"), ("RESOURCE_EXHAUSTED", "QUEUE_FULL")} == told
    assert all(record.retry_after for record in step.records if record.reason == "QUEUE_FULL")
    expired = [record for record in step.records if record.reason == "DEADLINE_EXCEEDED"]
    assert all(record.latency >= 0.5 for record in expired)
    assert (0.0, 1.0) == (figures.good_share, figures.error_share)


async def test_deadline_is_the_servers(tiny):
    """A deadline that no answer can meet is told by camserve, with its reason, and not by gRPC."""
    mix = Mix(kinds=(kind("tiny", ["grad-cam"], deadline=0.000001),), inputs=(input_bytes(TENSOR),))

    async with Connections(tiny.target) as connections:
        step = await run_step(connections, mix, Closed(1), Window(requests=3))

    assert {("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")} == {(record.code, record.reason) for record in step.records}

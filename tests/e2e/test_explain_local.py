"""`camserve explain --local`: the command's own outputs, without a server."""

from __future__ import annotations

import importlib.metadata
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support.nets import TinyNet

from camserve.client.cli import main


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No server is anywhere near."""
    monkeypatch.setenv("CAMSERVE_SERVER", "localhost:1")


def run(*arguments: object) -> tuple[int, list[dict], str]:
    """Runs the command; returns its status, its lines of JSON and what it said on standard error."""
    done = CliRunner().invoke(main, ["explain", *map(str, arguments)])
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_outputs_are_those_of_a_server(demo_server, samples, tmp_path):
    """The same lines but for times and ids, and the same files; one row a pass, which moves no last bits."""
    flags = [*samples[:2], "-m", "grad-cam", "-m", "layercam", "--raw", "--top-k", "2"]

    _, served, _ = run(*flags, "--concurrency", 1, "--server", demo_server.target, "--out", tmp_path / "served")
    status, made, said = run(*flags, "--local", "demo", "--out", tmp_path / "local")

    assert (0, "") == (status, said)
    for ours, theirs in zip(made, served, strict=True):
        assert ours["prediction"] == theirs["prediction"]
        for one, other in zip(ours["heatmaps"], theirs["heatmaps"], strict=True):
            with Image.open(one["overlay"]) as mine, Image.open(other["overlay"]) as its:
                assert mine.tobytes() == its.tobytes()
            assert np.array_equal(np.load(one["raw"]), np.load(other["raw"]))
            assert one["target"] == other["target"]


def test_a_bare_archive_takes_size_and_labels(samples, tmp_path):
    """As `camserve serve --model` does."""
    torch.jit.save(torch.jit.script(TinyNet().eval()), str(tmp_path / "part.pt"))
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")

    status, (line,), _ = run(
        samples[0], "--local", tmp_path / "part.pt", "--size", 32, "--labels", tmp_path / "labels.txt", "--target", "b"
    )

    assert 0 == status
    assert ("part", "b") == (line["summary"]["model"], line["heatmaps"][0]["target"]["label"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--local", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--local", "demo", "--model", "other"], "'other' is not loaded; it is 'surface'"),
        (["--labels", "LICENSE"], "--labels is for --local"),
        (["--size", "32"], "--size is for --local"),
    ],
)
def test_wrong_usage_is_told_in_a_line(samples, flags, words):
    """Without a traceback."""
    status, lines, said = run(samples[0], *flags)

    assert status in (1, 2)
    assert [] == lines
    assert words in said


def test_the_light_client_says_what_to_install(samples, monkeypatch):
    """Where the server package is not installed, its entry point is not there either."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])

    status, _, said = run(samples[0], "--local", "demo")

    assert 1 == status
    assert "pip install 'camserve[server]'" in said

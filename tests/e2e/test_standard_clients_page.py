"""The examples of docs/standard-clients.md, run as written but for the server's address, each where its packages are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.standard_clients import ROOT, run

PAGE = (ROOT / "docs" / "standard-clients.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, samples) -> Path:
    """Where the examples run: with a picture, and with the proto file that Node's reads."""
    (picture,) = (path for path in samples if path.name == "scratch-twill.jpg")
    shutil.copy(picture, tmp_path / "part.jpg")
    shutil.copy(ROOT / "protos" / "inference" / "open_inference.proto", tmp_path)
    return tmp_path


def examples(language: str, target: str, about: str = "") -> list[str]:
    """The page's examples in one language, of Python those that begin with a comment about a client."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    chosen = [code for code in found if language != "python" or (code.startswith("#") and about in code.split("\n")[0])]
    return [code.replace("localhost:50051", target) for code in chosen]


def test_our_client(demo_server, folder):
    """It prints the label and the shapes of two maps."""
    (example,) = (
        code for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if "camserve" in code
    )

    done = subprocess.run(  # noqa: S603 - the page's own text
        [sys.executable, "-c", example.replace("localhost:50051", demo_server.target)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    assert "scratch [(20, 20), (20, 20)]\n" == done.stdout


@pytest.mark.needs_tritonclient
def test_tritonclient(demo_server, folder):
    """One request prints the best class and two maps; the stream prints the prediction before the map."""
    at_once, streamed = (
        run("tritonclient", "-c", code, cwd=folder) for code in examples("python", demo_server.target, "triton")
    )

    best, shapes, label = at_once.splitlines()
    assert re.fullmatch(r"0\.\d+:1:scratch", best)
    assert ("(1, 160, 160) (1, 160, 160)", "scratch") == (shapes, label)
    assert ["part-4711 ['logits']", "part-4711 ['heatmap']"] == streamed.splitlines()


@pytest.mark.needs_kserve
def test_kserve(demo_server, folder):
    """It prints the shapes of what it asked for."""
    (example,) = examples("python", demo_server.target, "kserve")

    said = run("kserve", "-c", example, cwd=folder).splitlines()

    assert ["probabilities (1, 5)", "heatmap:0 (1, 20, 20)", "heatmap:1 (1, 40, 40)"] == said


@pytest.mark.needs_node
def test_node(demo_server, folder):
    """With the proto file it prints shapes and largest values; by reflection the names of the outputs."""
    by_proto, by_reflection = (run("node", "-e", code, cwd=folder) for code in examples("js", demo_server.target))

    assert re.fullmatch(r"probabilities \[ 1, 5 \] 0\.\d+\nheatmap \[ 1, 40, 40 \] \d\.\d+\n", by_proto)
    assert "logits probabilities heatmap\n" == by_reflection


def test_buf_curl(demo_server, folder):
    """Each command prints JSON: readiness, metadata, and a picture of the map."""
    (commands,) = examples("sh", demo_server.target)

    done = subprocess.run(  # noqa: S603 - the page's own text
        ["bash", "-eo", "pipefail", "-c", commands],  # noqa: S607 - whichever bash there is
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert 0 == done.returncode, done.stderr
    decoder, read, answers = json.JSONDecoder(), 0, []
    while said := done.stdout[read:].lstrip():
        answer, length = decoder.raw_decode(said)
        answers.append(answer)
        read = len(done.stdout) - len(said) + length
    ready, model, explained = answers
    assert {"ready": True} == ready
    assert ["logits", "probabilities", "heatmap"] == [output["name"] for output in model["outputs"]]
    assert ["heatmap"] == [output["name"] for output in explained["outputs"]]

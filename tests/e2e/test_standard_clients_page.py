"""The examples of docs/standard-clients.md, run as written but for the server's address, each where its packages are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.credentials import authority, key_entry, server_pair
from support.servers import settings
from support.standard_clients import ROOT, run

from camserve.server.background import BackgroundServer
from camserve.server.models.sources import demo_sources

PAGE = (ROOT / "docs" / "standard-clients.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, samples) -> Path:
    """Where the examples run: with a picture, and with the proto file that Node's reads."""
    (picture,) = (path for path in samples if path.name == "scratch-twill.jpg")
    shutil.copy(picture, tmp_path / "part.jpg")
    shutil.copy(ROOT / "protos" / "inference" / "open_inference.proto", tmp_path)
    return tmp_path


def examples(heading: str, language: str, target: str) -> list[str]:
    """The fenced blocks of a language under a heading, asking this server."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [re.sub(r"(localhost|gpu7):50051", target, code) for code in found]


def shell(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs commands where ours and buf's are found."""
    return subprocess.run(  # noqa: S603 - the page's own text
        ["bash", "-eo", "pipefail", "-c", commands],  # noqa: S607 - whichever bash there is
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_our_client(demo_server, folder):
    """It prints the label and the shapes of two maps."""
    (example,) = examples("Python, with our client", "python", demo_server.target)

    done = subprocess.run(  # noqa: S603 - the page's own text
        [sys.executable, "-c", example], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )

    assert "scratch [(20, 20), (20, 20)]\n" == done.stdout


@pytest.mark.needs_tritonclient
def test_tritonclient(demo_server, folder):
    """One request prints the best class and two maps; the stream prints the prediction before the map."""
    at_once, streamed = (
        run("tritonclient", "-c", code, cwd=folder) for code in examples("tritonclient", "python", demo_server.target)
    )

    best, shapes, label = at_once.splitlines()
    assert re.fullmatch(r"0\.\d+:1:scratch", best)
    assert ("(1, 160, 160) (1, 160, 160)", "scratch") == (shapes, label)
    assert ["part-4711 ['logits']", "part-4711 ['heatmap']"] == streamed.splitlines()


@pytest.mark.needs_kserve
def test_kserve(demo_server, folder):
    """It prints the shapes of what it asked for."""
    (example,) = examples("KServe", "python", demo_server.target)

    said = run("kserve", "-c", example, cwd=folder).splitlines()

    assert ["probabilities (1, 5)", "heatmap:0 (1, 20, 20)", "heatmap:1 (1, 40, 40)"] == said


@pytest.mark.needs_node
def test_node(demo_server, folder):
    """With the proto file it prints shapes and largest values; by reflection the names of the outputs."""
    by_proto, by_reflection = (
        run("node", "-e", code, cwd=folder) for code in examples("Node", "js", demo_server.target)
    )

    assert re.fullmatch(r"probabilities \[ 1, 5 \] 0\.\d+\nheatmap \[ 1, 40, 40 \] \d\.\d+\n", by_proto)
    assert "logits probabilities heatmap\n" == by_reflection


def test_buf_curl(demo_server, folder):
    """Each command prints JSON: readiness, metadata, and a picture of the map."""
    (commands,) = examples("buf curl", "sh", demo_server.target)

    done = shell(commands, folder)

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


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], tuple[str, str]]]:
    """A server with TLS that asks for keys: lays its authority into a folder, and gives its address and a key."""
    folder = tmp_path_factory.mktemp("guarded")
    root = authority()
    certificate, private = server_pair(root).write(folder, "server")
    key, entry = key_entry("line-3", ["explain"])
    (folder / "callers.toml").write_text(entry, encoding="utf-8")

    def settle(where: Path) -> tuple[str, str]:
        (where / "ca.pem").write_bytes(root.certificate)
        return f"localhost:{server.app.port}", key

    changes = {"callers": folder / "callers.toml", "tls_certificate": certificate, "tls_key": private}
    with BackgroundServer(settings(**changes), demo_sources()) as server:
        yield settle


@pytest.mark.parametrize(
    ("client", "language", "place"),
    [
        pytest.param("tritonclient", "python", 0, marks=pytest.mark.needs_tritonclient),
        pytest.param("kserve", "python", 1, marks=pytest.mark.needs_kserve),
        pytest.param("node", "js", 0, marks=pytest.mark.needs_node),
    ],
)
def test_credentials(guarded, folder, monkeypatch, client, language, place):
    """With a key, and the authority that signed the server's certificate, the example is answered; with another key refused."""
    target, key = guarded(folder)
    example = examples("Credentials", language, target)[place]
    flag = "-e" if client == "node" else "-c"

    monkeypatch.setenv("CAMSERVE_API_KEY", key)
    assert "true" == run(client, flag, example, cwd=folder).strip().lower()

    monkeypatch.setenv("CAMSERVE_API_KEY", key[:-1] + ("a" if key[-1] != "a" else "b"))
    with pytest.raises(AssertionError, match="UNAUTHENTICATED"):
        run(client, flag, example, cwd=folder)


def test_credentials_of_buf_curl(guarded, folder, monkeypatch):
    """The key goes with reflection too; where it is wrong, that is what fails first, and the page tells how buf says so."""
    target, key = guarded(folder)
    (commands,) = examples("Credentials", "sh", target)

    monkeypatch.setenv("CAMSERVE_API_KEY", key)
    done = shell(commands, folder)
    assert {"ready": True} == json.loads(done.stdout), done.stderr

    monkeypatch.setenv("CAMSERVE_API_KEY", "wrong")
    done = shell(commands, folder)
    assert 0 != done.returncode
    assert "failed to find service" in done.stderr

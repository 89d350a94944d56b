"""README's examples, run as written but for the server's address: a free port is used so that a running server is left alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command where the samples' path of README leads to them."""
    (folder / "server").symlink_to(ROOT / "server")
    return subprocess.run(  # noqa: S603 - README's own text
        command,
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_python_example(demo_server, tmp_path):
    """It prints the label and the map's shape, and writes the picture."""
    (example,) = blocks("python")

    done = run([sys.executable, "-c", example.replace("localhost:50051", demo_server.target)], tmp_path)

    assert ("", 0) == (done.stderr, done.returncode)
    label, shape = done.stdout.splitlines()
    assert label.startswith("scratch ")
    assert re.fullmatch(r"\(\d+, \d+\)", shape)
    assert (tmp_path / "why.png").stat().st_size > 0


def test_terminal_example(demo_server, tmp_path, samples):
    """Each `$` line succeeds; explain prints one JSON line and writes two overlays for each sample."""
    (example,) = blocks("console")
    commands = [line.removeprefix("$ ") for line in example.splitlines()]

    done = run(["bash", "-ec", "\n".join(commands)], tmp_path, CAMSERVE_SERVER=demo_server.target)

    assert 0 == done.returncode, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(samples) == len(lines)
    assert 2 * len(samples) == len(list((tmp_path / "maps").rglob("*.png")))
    assert "surface" in done.stdout

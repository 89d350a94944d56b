"""Clients that people have of other servers, each in an environment of its own below build/clients, which `make clients` makes.

A script in tests/clients gets there what it shall ask, and prints one JSON object: what it was answered.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["ask", "packages", "run"]

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "build" / "clients"
SCRIPTS = ROOT / "tests" / "clients"


def packages(client: str) -> Path:
    """Where the packages of a Python client are."""
    (folder,) = (CLIENTS / client / "lib").glob("python3*/site-packages")
    return folder


def run(client: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """Runs Python or Node as that client's environment has it; returns standard output, showing all it said if it fails."""
    program = "node" if client == "node" else str(CLIENTS / client / "bin" / "python")
    # Nothing of ours may be importable there, nor the other way about.
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(  # noqa: S603 - our own scripts
        [program, *map(str, arguments)],
        cwd=cwd,
        env={**environment, "NODE_PATH": str(CLIENTS / "node" / "node_modules")},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def ask(client: str, script: str, *arguments: str | Path) -> Any:
    """Runs one of the client's scripts; what it prints, read as JSON."""
    return json.loads(run(client, SCRIPTS / client / script, *arguments))

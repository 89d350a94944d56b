"""The soak's short form: it runs to its end, it ends early when it is told to, and says what it saw either way."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest
from soak.acts import ACTS, PROBE
from support.processes import STEADY

# Two processes load torch and models before anything is sent, which a busy machine takes minutes for.
pytestmark = pytest.mark.timeout(600)

# Warming up is most of so short a run: neither memory nor times say anything yet.
LENIENT = ("--most-growth-mib", "1000", "--window", "0.25", "--seed", "3")


async def begin(out: Path, seconds: float) -> Process:
    """Starts `make soak` with these seconds."""
    command = ["-W", "ignore", "-m", "soak", "--seconds", str(seconds), "--rate", "20", "--out", str(out), *LENIENT]
    return await asyncio.create_subprocess_exec(sys.executable, *command, stdout=PIPE, env=STEADY)


async def test_soak_runs_to_its_end(tmp_path):
    """Some seconds of every act: all is well, and the figures are written."""
    process = await begin(tmp_path, 5)
    said, _ = await process.communicate()
    document = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))

    assert [] == [finding for finding in document["findings"] if not finding["is_well"]]
    assert 0 == process.returncode
    assert document["windows"]
    # Drawn with a seed by which even the rarest act comes up in the first second.
    assert {PROBE.name, *ACTS} == {end["act"] for end in document["ends"]}
    assert (tmp_path / "soak.md").read_text(encoding="utf-8") in said.decode()


async def test_soak_ends_when_interrupted(tmp_path):
    """Ctrl-C after the first window: the server is ended, what was seen is judged, and the status says that it was cut short."""
    process = await begin(tmp_path, 3600)
    assert process.stdout is not None
    first = await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said, _ = await process.communicate()
    document = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))

    assert b"MiB" in first
    assert b"ended early" in said
    assert 1 == process.returncode
    unwell = {finding["name"] for finding in document["findings"] if not finding["is_well"]}
    assert {"length"} <= unwell <= {"length", "windows"}

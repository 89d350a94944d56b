"""Claims about processes that are measured and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from benchmarks.peers.processes import free_ports, running

# A parent that ignores SIGTERM, and its child; the parent tells the child's number once both are there.
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
waits = "print('here', flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
DRIVER = """
import asyncio, contextlib, pathlib, sys
from benchmarks.peers.processes import interrupt_once, running

async def measure():
    print("measuring", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("ending", flush=True)

interrupt_once()
with contextlib.suppress(KeyboardInterrupt):
    with running([sys.executable, "-c", sys.argv[1]], environment={}, log=pathlib.Path(sys.argv[2]), patience_seconds=1):
        asyncio.run(measure())
"""
OBEDIENT = STUBBORN.replace("signal.SIG_IGN", "lambda *_: sys.exit()")


def child_of(log: Path) -> psutil.Process:
    """The child, as soon as the log tells it."""
    while not (text := log.read_text(encoding="utf-8")).endswith("\n"):
        continue
    return psutil.Process(int(text))


def test_ports_are_different() -> None:
    """Ports for one server are asked for together, so that none is given twice."""
    assert 8 == len(set(free_ports(8)))


def test_whole_tree_ends_also_after_an_exception(tmp_path: Path) -> None:
    """Leaving the block ends the children too, and lets the exception through."""
    log = tmp_path / "log"

    children = []

    def interrupted() -> None:
        with running([sys.executable, "-c", OBEDIENT], environment={}, log=log) as tree:
            children.append(child_of(log))
            assert tree.is_running
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not children[0].is_running()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_impatient_caller_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    """A driver that is told to end twice still ends its server, though that takes a while."""
    log = tmp_path / "log"
    driver = subprocess.Popen(  # noqa: S603 - this interpreter
        [sys.executable, "-c", DRIVER, STUBBORN, str(log)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
    )
    assert driver.stdout is not None
    assert b"measuring\n" == driver.stdout.readline()
    child = child_of(log)

    driver.send_signal(number)
    assert b"ending\n" == driver.stdout.readline()
    driver.send_signal(number)

    assert 0 == driver.wait(timeout=30)
    driver.stdout.close()
    assert not child.is_running()


def test_stubborn_processes_are_killed(tmp_path: Path) -> None:
    """What does not leave when asked is killed."""
    log = tmp_path / "log"

    with running([sys.executable, "-c", STUBBORN], environment={}, log=log, patience_seconds=0.2) as tree:
        child = child_of(log)

    assert not tree.is_running
    assert not child.is_running()


def test_memory_is_of_the_whole_tree(tmp_path: Path) -> None:
    """Parent and child count, and what they share counts once."""
    log = tmp_path / "log"

    with running([sys.executable, "-c", OBEDIENT], environment={}, log=log) as tree:
        child = child_of(log)
        both, one = tree.resident_bytes(), child.memory_full_info().uss

    assert one < both

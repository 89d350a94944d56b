"""Runs one server as a process tree: started, looked at, and gone when the block is left, however that happens.

`contenders.py` says which command; what the server writes goes to a log file.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import psutil

# Ray takes a few seconds to take its processes down in order.
LEAVE_SECONDS = 15.0


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]


def interrupt_once() -> None:
    """Makes the first SIGINT or SIGTERM a `KeyboardInterrupt` and lets later ones pass: they would leave a server half ended."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


class ProcessTree:
    """A process and all that it started.

    Args:
        root: its first process.
    """

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._seen: set[psutil.Process] = {root}

    @property
    def is_running(self) -> bool:
        """Whether the first process still lives."""
        return bool(self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE)

    def resident_bytes(self) -> int:
        """Proportional set size of the whole tree: a page that several of its processes share counts once."""
        total = 0
        for process in self._look():
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # It ended between the two looks.
        return total

    def end(self, patience_seconds: float) -> None:
        """Asks the first process to end, and after so long kills what is left of all that was ever seen."""
        self._look()
        if self.is_running:
            self._root.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(self._seen, timeout=patience_seconds)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=LEAVE_SECONDS)

    def _look(self) -> set[psutil.Process]:
        try:
            now = {self._root, *self._root.children(recursive=True)}
        except psutil.NoSuchProcess:
            now = set()
        self._seen |= now
        return now


@contextmanager
def running(
    command: Sequence[str], *, environment: Mapping[str, str], log: Path, patience_seconds: float = LEAVE_SECONDS
) -> Iterator[ProcessTree]:
    """Starts a command in a session of its own, so that Ctrl-C reaches only the driver, which then ends it.

    Args:
        command: program and arguments.
        environment: added to this process's own.
        log: file for both of its outputs.
        patience_seconds: between asking it to end and killing it.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - commands of contenders.py
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    tree = ProcessTree(psutil.Process(process.pid))
    try:
        yield tree
    finally:
        tree.end(patience_seconds)
        process.wait()

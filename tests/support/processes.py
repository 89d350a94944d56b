"""camserve and its control, each in a process of its own, and a client that asks both alike with as little of its own as can be.

For tests that compare their speed and their memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import psutil

from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import input_pb2, spec_pb2

__all__ = [
    "STEADY",
    "ServerProcess",
    "answer",
    "ask",
    "camserve_process",
    "connected",
    "control_process",
    "explained_tensor",
]

_TESTS = str(Path(__file__).parents[1])
STEADY: Mapping[str, str] = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (_TESTS, os.environ.get("PYTHONPATH")))),
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""An environment for figures of memory: the allocator gives back what is large, and has few arenas to keep the rest in."""

_EXPLAIN = "/camserve.v1.ExplanationService/Explain"


class ServerProcess:
    """A server in a process of its own.

    Args:
        command: for this interpreter.
        log: where its standard error goes.
        environment: of the process.
        is_apart: whether Ctrl-C in this terminal is not for it.

    Attributes:
        target: where to connect.
        pid: of the process.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], *, is_apart: bool = False
    ) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                [sys.executable, *command], stderr=stderr, env=dict(environment), start_new_session=is_apart
            )
        self.pid = self._process.pid
        self.target = f"127.0.0.1:{self._port()}"

    def resident_bytes(self) -> int:
        """Its resident set."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def peak_bytes(self) -> int:
        """Its largest resident set since `forget_peak`."""
        told = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text(encoding="ascii"), re.MULTILINE)
        assert told is not None
        return int(told[1]) * 1024

    def forget_peak(self) -> None:
        """From now on the peak is counted anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="ascii")

    def ask_to_end(self) -> None:
        """Sends SIGTERM; once is a drain, twice is the end."""
        self._process.send_signal(signal.SIGTERM)

    def ended(self, timeout_seconds: float = 180) -> int:
        """Waits until it has ended; its exit status."""
        return self._process.wait(timeout=timeout_seconds)

    def end(self) -> None:
        """Asks it to stop and waits."""
        if self._process.poll() is None:
            self.ask_to_end()
        self.ended()

    def _port(self) -> int:
        """Reads the log until it tells the port: a process says nothing else that could be awaited."""
        until = time.monotonic() + 300
        while time.monotonic() < until and self._process.poll() is None:
            found = re.search(r"ready on port (\d+) with", self._log.read_text(encoding="utf-8", errors="replace"))
            if found:
                return int(found[1])
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self._log.read_text(encoding='utf-8', errors='replace')}")


@contextlib.contextmanager
def camserve_process(archive: Path, size: int, log: Path, environment: Mapping[str, str]) -> Iterator[ServerProcess]:
    """`camserve serve` with one model called tiny, as an operator would run it: logs at info, metrics on."""
    flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--drain-delay-seconds", "0"]
    run = [
        "-W",
        "ignore",
        str(Path(sys.executable).with_name("camserve")),
        "serve",
        "--model",
        f"tiny={archive}",
        "--size",
        str(size),
    ]
    process = ServerProcess([*run, *flags, "--log-format", "json"], log, environment)
    try:
        yield process
    finally:
        process.end()


@contextlib.contextmanager
def control_process(
    messages: Sequence[bytes], folder: Path, environment: Mapping[str, str], pause_seconds: float = 0
) -> Iterator[ServerProcess]:
    """The control, which answers with these messages, so long a pause before each."""
    told = folder / "messages.hex"
    told.write_text("\n".join(message.hex() for message in messages), encoding="ascii")
    process = ServerProcess(
        ["-m", "support.control", str(told), str(pause_seconds)], folder / "control.log", environment
    )
    try:
        yield process
    finally:
        process.end()


def explained_tensor(shape: Sequence[int], data: bytes) -> bytes:
    """A request for one Grad-CAM map of a float32 tensor, serialised."""
    tensor = input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=shape, data=data)
    spec = spec_pb2.Spec(method=spec_pb2.METHOD_GRAD_CAM)
    return service_pb2.ExplainRequest(model="tiny", tensor=tensor, specs=[spec]).SerializeToString()


@contextlib.asynccontextmanager
async def connected(server: ServerProcess) -> AsyncIterator[grpc.aio.UnaryStreamMultiCallable]:
    """The Explain call as bytes in, bytes out."""
    async with grpc.aio.insecure_channel(server.target, [("grpc.max_receive_message_length", -1)]) as channel:
        yield channel.unary_stream(_EXPLAIN)


async def answer(call: grpc.aio.UnaryStreamMultiCallable, request: bytes) -> list[bytes]:
    """Sends one request; the messages of its answer."""
    return [message async for message in call(request)]


async def ask(call: grpc.aio.UnaryStreamMultiCallable, request: bytes, *, count: int, concurrency: int) -> float:
    """Sends that many requests, so many at a time, each as soon as another is answered; the seconds it took."""
    left = iter(range(count))

    async def one_after_another() -> None:
        for _ in left:
            assert 3 == len(await answer(call, request))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one_after_another())
    return time.perf_counter() - started

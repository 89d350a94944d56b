"""What tests under load share: a `camserve serve` process with its log and metrics page, and a step in a few figures.

The generator has a process of its own, the test's. Its garbage collector rests while it measures: with torch imported, one full
collection stops it for longer than most figures here are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import re
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from support.processes import ServerProcess

from camserve.client import TensorInput
from camserve.client.bench import Record, Step, input_bytes

__all__ = [
    "Served",
    "machine_load",
    "measuring",
    "percentile",
    "random_input",
    "refused",
    "resnet",
    "served",
    "served_folder",
    "started",
    "total",
    "unread",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server under load.

    Attributes:
        process: it runs in.
        log: its lines, as JSON.
    """

    process: ServerProcess
    log: Path

    @property
    def port(self) -> int:
        """Of gRPC."""
        return int(self.process.target.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid

    @property
    def target(self) -> str:
        """Where to connect."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """Lets it drain and waits for its end."""
        self.process.end()

    def calls(self, since: int = 0) -> list[Mapping[str, object]]:
        """The access lines from the `since`-th on: status and seconds of each call, as the server saw it."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        read = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in read if line.get("event") == "call" and line["rpc"].endswith("/Explain")][since:]

    @property
    def metrics_port(self) -> int:
        """Of the metrics page."""
        found = re.search(r"metrics on port (\d+)", self.log.read_text(encoding="utf-8", errors="replace"))
        assert found is not None
        return int(found[1])

    def metrics(self) -> list[Sample]:
        """Every sample of the metrics page as it is now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60) as answer:
            page = answer.read().decode()
        return [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all samples of that name whose labels hold these, as the page is now."""
        return total(self.metrics(), name, **labels)


def total(samples: Sequence[Sample], name: str, **labels: str) -> float:
    """Sum of the samples of that name whose labels hold these."""
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


@contextlib.contextmanager
def served(archive: Path, size: int, log: Path, **settings: object) -> Iterator[Served]:
    """`camserve serve` with one model called net, on IPv4 and IPv6, so that a test can be two callers.

    Args:
        archive: TorchScript.
        size: of its input, pixels.
        log: where its lines go.
        settings: by name, such as `slice_seconds=0.02`.
    """
    server = started(
        ["--model", f"net={archive}", "--size", str(size), "--listen", "[::]:0", "--allow-anonymous"], log, **settings
    )
    with contextlib.closing(server):
        yield server


@contextlib.contextmanager
def served_folder(
    repository: Path, log: Path, environment: Mapping[str, str] | None = None, **settings: object
) -> Iterator[Served]:
    """`camserve serve` with a repository.

    Args:
        repository: its folder.
        log: where its lines go.
        environment: of the process; this one's unless told.
        settings: by name, such as `slice_seconds=0.02`.
    """
    server = started(["--models", str(repository), "--listen", "127.0.0.1:0"], log, environment, **settings)
    with contextlib.closing(server):
        yield server


def started(
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    is_apart: bool = False,
    **settings: object,
) -> Served:
    """`camserve serve` with these flags, once it is ready: logs as JSON, a free port for metrics, no pause before draining."""
    program = str(Path(sys.executable).with_name("camserve"))
    common = ["--metrics-listen", "127.0.0.1:0", "--drain-delay-seconds", "0", "--log-format", "json"]
    given = {f"CAMSERVE_{name.upper()}": str(value) for name, value in settings.items()}
    command = ["-W", "ignore", program, "serve", *flags, *common]
    variables = {**(os.environ if environment is None else environment), **given}
    return Served(process=ServerProcess(command, log, variables, is_apart=is_apart), log=log)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """The garbage collector rests for the length of a `with` block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def resnet(name: str, folder: Path) -> Path:
    """A scripted ResNet with seeded random weights."""
    path = folder / f"{name}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None).eval()
    torch.jit.save(torch.jit.script(module), str(path))
    return path


def random_input(size: int) -> bytes:
    """A random tensor, as the part of a request."""
    values = np.random.default_rng(0).standard_normal((3, size, size)).astype(np.float32)
    return input_bytes(TensorInput(values))


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank, so that it occurred; NaN of nothing."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)] if values else math.nan


def refused(step: Step) -> list[Record]:
    """The requests that were turned away."""
    return [record for record in step.due if record.code == "RESOURCE_EXHAUSTED"]


def unread(step: Step) -> list[float]:
    """Of each answer, seconds outside of the server's own account: in gRPC on both sides, and waiting to be read."""
    return [
        record.ended - record.sent - record.timings.total
        for record in step.due
        if record.sent is not None and record.timings is not None
    ]


def machine_load() -> str:
    """For beside the figures, because machines are shared."""
    return f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"

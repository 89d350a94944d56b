"""What tests of a running server share: settings with free ports, archives to serve, and the metrics page as numbers."""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from camserve.server.background import BackgroundServer
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource, demo_sources
from camserve.server.settings import Settings


def settings(**changes: object) -> Settings:
    """Settings of a test server: free ports, no pause before draining."""
    return Settings(
        **{
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "drain_delay_seconds": 0,
            "log_level": "error",
            # Chunks as large as passes: how many rows fill a slice differs from load to load, and last bits with it.
            "slice_seconds": 60,
            # All of a test's clients are one host, hence one caller.
            "caller_concurrency": 0,
            **changes,
        }
    )


def script_source(name: str, module: nn.Module, folder: Path, **config: object) -> ModelSource:
    """Saves a module as a TorchScript archive and describes it; input 32 px unless told."""
    path = folder / f"{name}.pt"
    torch.jit.save(torch.jit.script(module.eval()), str(path))
    given: dict[str, object] = {"input": InputConfig(size=(32, 32)), **config}
    return ModelSource(name=name, version="1", path=path, config=ModelConfig(**given))


class Metrics:
    """A server's metrics page, read over HTTP."""

    def __init__(self, server: BackgroundServer) -> None:
        self._url = f"http://127.0.0.1:{server.app.metrics_port}/metrics"

    def text(self) -> str:
        """The page as it is now."""
        with urllib.request.urlopen(self._url, timeout=60) as answer:  # noqa: S310 - our own server on loopback
            return answer.read().decode()

    def value(self, name: str, **labels: str) -> float:
        """Sum of all samples of that name whose labels hold these."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


async def until(is_so: Callable[[], bool], timeout_seconds: float = 120) -> None:
    """Reads the metrics page until it shows what is waited for: the page has no events to await."""
    async with asyncio.timeout(timeout_seconds):
        while not await asyncio.to_thread(is_so):  # noqa: ASYNC110 - another process's page can only be read again
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def serving(*, with_model: bool = False, **changes: object) -> Iterator[BackgroundServer]:
    """A server with these settings, without a model unless the shipped one is asked for."""
    with BackgroundServer(settings(**changes), demo_sources() if with_model else ()) as server:
        yield server


def soon(is_so: Callable[[], bool], timeout_seconds: float = 60) -> None:
    """Asks again and again: what a server has read of a file can only be found out by asking."""
    end = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)

"""What any test may ask for: real servers on free ports, real clients, real files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch is imported, and by every process a test starts. Small nets on several threads of a busy machine wait more than
# they compute; benchmarks say otherwise in the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from support.servers import settings

from camserve.client import Client
from camserve.server.background import BackgroundServer
from camserve.server.models.sources import ModelSource, demo_sources

SAMPLES = Path(__file__).parents[1] / "server" / "camserve" / "server" / "demo" / "samples"


@pytest.fixture(scope="session")
def demo_server() -> Iterator[BackgroundServer]:
    """The shipped model, served."""
    with BackgroundServer(settings(), demo_sources()) as server:
        yield server


@pytest.fixture(scope="session")
def client(demo_server: BackgroundServer) -> Iterator[Client]:
    """A client of the demo server."""
    with Client(demo_server.target) as client:
        yield client


@pytest.fixture(scope="session")
def samples() -> list[Path]:
    """The shipped sample images, in order of name."""
    return sorted(path for path in SAMPLES.iterdir() if path.suffix in {".png", ".jpg"})


@pytest.fixture
def serve() -> Iterator[Callable[..., BackgroundServer]]:
    """Starts servers that end with the test."""
    running: list[BackgroundServer] = []

    def start(*sources: ModelSource, **changes: object) -> BackgroundServer:
        server = BackgroundServer(settings(**changes), sources)
        server.__enter__()
        running.append(server)
        return server

    yield start
    for server in running:
        server.__exit__(None, None, None)

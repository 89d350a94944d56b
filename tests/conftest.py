"""What any test may ask for: real servers on free ports, real clients, real files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch is imported, and by every process a test starts. Small nets on several threads of a busy machine wait more than
# they compute; benchmarks say otherwise in the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import structlog
from support.servers import settings

from camserve.client import Client
from camserve.server.background import BackgroundServer
from camserve.server.models.sources import ModelSource, demo_sources

# An example takes as long as a busy machine lets it. What CI finds, it finds in every run of that commit.
hypothesis.settings.register_profile("camserve", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("camserve")

# Programs and files that some tests need, by marker, and what to do on machines without them.
_CLIENTS = Path(__file__).parents[1] / "build" / "clients"
_NEEDS = {
    "needs_compiler": ([os.environ.get("CXX", "g++")], "there is no C++ compiler; install g++ or set CXX"),
    "needs_kserve": ([_CLIENTS / "kserve" / ".installed"], "there is no kserve; run `make clients`"),
    "needs_node": (
        ["node", _CLIENTS / "node" / ".installed"],
        "there is no gRPC for Node; install npm, run `make clients`",
    ),
    "needs_prometheus": (["prometheus", "promtool"], "there is no Prometheus; install Debian's package prometheus"),
    "needs_tritonclient": ([_CLIENTS / "tritonclient" / ".installed"], "there is no tritonclient; run `make clients`"),
}
_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs something that this machine does not have."""
    config.stash[_LEFT_OUT] = counts = {}
    for marker, (needed, _) in _NEEDS.items():
        if all(one.exists() if isinstance(one, Path) else shutil.which(one) for one in needed):
            continue
        left_out = [item for item in items if item.get_closest_marker(marker) is not None]
        if left_out:
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)
            counts[marker] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says what was left out, and what would bring it back."""
    for marker, count in config.stash.get(_LEFT_OUT, {}).items():
        terminalreporter.write_line(f"{count} tests were left out: {_NEEDS[marker][1]}")


@pytest.fixture
def log_lines() -> Iterator[list[structlog.typing.EventDict]]:
    """What is logged during a test, at every level, whatever servers of other tests have set for this process."""
    before = structlog.get_config()
    structlog.reset_defaults()
    with structlog.testing.capture_logs() as lines:
        yield lines
    structlog.configure(**before)


SAMPLES = Path(__file__).parents[1] / "server" / "camserve" / "server" / "demo" / "samples"


@pytest.fixture(scope="session")
def demo_server() -> Iterator[BackgroundServer]:
    """The shipped model, served."""
    with BackgroundServer(settings(), demo_sources()) as server:
        yield server


@pytest.fixture(scope="session")
def client(demo_server: BackgroundServer) -> Iterator[Client]:
    """A client of the demo server."""
    with Client(demo_server.target, timeout=120) as client:
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

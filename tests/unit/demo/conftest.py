"""Pictures shared by the demo's tests: generated once, since a hundred cost two seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.jit import ScriptModule

from camserve.server import demo
from camserve.server.demo import surfaces
from camserve.server.demo.surfaces import Surface
from camserve.server.demo.train import training_set

_MODEL = Path(next(iter(demo.__path__))) / "models" / "surface"


@pytest.fixture(scope="session")
def held_out() -> list[Surface]:
    """Two hundred pictures of families the model has never seen, ten per family and class."""
    return surfaces.test_set(200)


@pytest.fixture(scope="session")
def seen() -> list[Surface]:
    """Three hundred pictures of the training families, five per family and class."""
    return training_set(300)


@pytest.fixture(scope="session")
def card_path() -> Path:
    """The shipped model card."""
    return _MODEL / "model.toml"


@pytest.fixture(scope="session")
def archive_path() -> Path:
    """The shipped archive."""
    return _MODEL / "1" / "model.pt"


@pytest.fixture(scope="session")
def shipped(archive_path: Path) -> ScriptModule:
    """The shipped model, loaded."""
    model: ScriptModule = torch.jit.load(str(archive_path))  # type: ignore[no-untyped-call]  # Untyped upstream.
    return model

"""docs/conformance.md tells what is compared, with what, and how near it came."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from contract.conformance.architectures import ARCHITECTURES
from contract.conformance.gates import COMPARISONS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "conformance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["grad-cam", "torchcam", "captum"])
def test_the_libraries_versions_are_told(name: str) -> None:
    """Those that are installed here, up to their patches; `write_docs.py` writes them."""
    version = importlib.metadata.version(name).rpartition(".")[0]

    assert f"{name} {version}." in PAGE


def test_every_comparison_is_in_the_table() -> None:
    """By library and method."""
    assert [] == [str(one) for one in COMPARISONS if f"| {one.library} | {one.method} |" not in PAGE]


def test_every_architecture_is_in_the_table() -> None:
    """By name."""
    assert [] == [one.name for one in ARCHITECTURES if one.name not in PAGE]

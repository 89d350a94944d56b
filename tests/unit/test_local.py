"""What can be named to load a model here, and what the command asks in place of a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.nets import TinyNet

from camserve.client import InvalidRequest, NotFound
from camserve.server.local.client import LocalClient
from camserve.server.local.source import source_of
from camserve.server.models.sources import demo_sources


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """An archive of four classes."""
    path = tmp_path / "part.pt"
    torch.jit.save(torch.jit.script(TinyNet().eval()), str(path))
    return path


def test_nothing_means_the_shipped_model() -> None:
    """So that the first try needs no file."""
    assert demo_sources() == [source_of("")]


def test_a_file_is_named_by_its_stem_or_as_told(part: Path) -> None:
    """As `camserve serve --model` has it."""
    assert ("part", "1", part) == (source_of(str(part)).name, source_of(str(part)).version, source_of(str(part)).path)
    assert "other" == source_of(f"other={part}").name


def test_a_folder_brings_its_card(part: Path) -> None:
    """Of a model in a repository, whatever lies beside it; what the caller says stands above the card."""
    folder = part.parent / "repository" / "mine"
    (folder / "2").mkdir(parents=True)
    (folder.parent / "broken").mkdir()
    (folder / "2" / "model.pt").write_bytes(part.read_bytes())
    (folder / "model.toml").write_text('labels = ["a", "b", "c", "d"]\n[input]\nsize = [32, 48]\nresize = "crop"\n')

    plain, changed = source_of(str(folder)), source_of(str(folder), labels=["e", "f", "g", "h"], size=(16, 24))

    assert ("mine", "2", ("a", "b", "c", "d"), (32, 48)) == (
        plain.name,
        plain.version,
        plain.config.labels,
        plain.config.input.size,
    )
    assert (("e", "f", "g", "h"), (16, 24), "crop") == (
        changed.config.labels,
        changed.config.input.size,
        changed.config.input.resize,
    )


def test_labels_may_come_from_a_file(part: Path) -> None:
    """One a line; a number is height and width."""
    file = part.parent / "labels.txt"
    file.write_text("a\nb\nc\nd\n")

    config = source_of(str(part), labels=file, size=32).config

    assert (("a", "b", "c", "d"), (32, 32)) == (config.labels, config.input.size)


def test_a_factory_takes_a_seed() -> None:
    """In place of pretrained weights."""
    factory = source_of("torchvision:resnet18", random_seed=3).config.factory

    assert factory is not None
    assert ("torchvision:resnet18", 3, False) == (factory.name, factory.random_seed, factory.pretrained)


@pytest.mark.parametrize(
    ("changed", "words"), [({"model": "nowhere.pt"}, "nowhere.pt does not exist"), ({"size": (0, 0)}, "size|shape")]
)
def test_what_cannot_be_is_told(changed: dict, words: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=words):
        source_of(**{"model": "", **changed}).config.recipe()


def test_the_command_asks_one_model(part: Path) -> None:
    """By its name and version; images that fail are told in their place, or end it."""
    images = [np.zeros((32, 32, 3), np.uint8), b"no picture", np.full((32, 32, 3), 200, np.uint8)]
    with LocalClient(str(part), size=32, labels=None, timeout=30) as client:
        (status,) = client.models()
        kept = list(client.explain_many(images, model="part", specs=["grad-cam"], on_error="return"))

        assert ("part", "1", "ready", 4) == (status.name, status.version, status.state, status.class_count)
        assert client.model("part", "1").default_layer == status.default_layer
        assert [False, True, False] == [isinstance(result, InvalidRequest) for result in kept]
        with pytest.raises(InvalidRequest):
            list(client.explain_many(images, model="part", specs=[]))
        for name, version in (("other", None), ("part", "2")):
            with pytest.raises(NotFound, match="is not loaded; it is 'part', '1'"):
                client.model(name, version)

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camserve.client import Client, InvalidInput
from camserve.client.bench import sources
from camserve.client.cards import ModelCard
from camserve.v1 import explanation_service_pb2


def _requests(source: sources.Source) -> list[explanation_service_pb2.ExplainRequest]:
    return [explanation_service_pb2.ExplainRequest.FromString(data) for data in source.inputs]


@pytest.fixture
def card(client: Client) -> ModelCard:
    """The card of the peer's model, with one further input."""
    return client.model("surface")


def test_made_up_pictures_are_jpegs_of_that_size() -> None:
    """Each decodes, all differ, and they weigh about what photographs do."""
    source = sources.synthetic(320, 240, 3, seed=0)

    files = [request.image.data for request in _requests(source)]
    assert 3 == len(set(files))
    for data in files:
        with Image.open(io.BytesIO(data)) as picture:
            assert ("JPEG", (320, 240)) == (picture.format, picture.size)
        assert 0.05 < len(data) / (320 * 240) < 1.0
    assert "3 synthetic JPEGs of 320 x 240" == source.name
    assert source.mean_bytes == pytest.approx(np.mean([len(data) for data in source.inputs]))


def test_a_seed_gives_the_same_inputs(card: ModelCard) -> None:
    """A run can be repeated elsewhere with the same bytes."""
    assert sources.synthetic(64, 48, 2, seed=5).inputs == sources.synthetic(64, 48, 2, seed=5).inputs
    assert sources.synthetic(64, 48, 2, seed=5).inputs != sources.synthetic(64, 48, 2, seed=6).inputs
    assert sources.tensors(card, 2, seed=5).inputs == sources.tensors(card, 2, seed=5).inputs


def test_tensors_have_the_models_shape(card: ModelCard) -> None:
    """As the card tells it, in float32."""
    source = sources.tensors(card, 2, seed=0)

    for request in _requests(source):
        assert card.input.shape == tuple(request.tensor.shape)
        assert 4 * np.prod(card.input.shape) == len(request.tensor.data)


def test_a_model_without_a_fixed_shape_has_no_tensors(card: ModelCard) -> None:
    """The refusal says what to do instead."""
    free = dataclasses.replace(card, input=dataclasses.replace(card.input, shape=(3, 0, 0)))

    with pytest.raises(ValueError, match="give images in place of --tensor"):
        sources.tensors(free, 1, seed=0)


def test_further_inputs_are_made_up_from_the_card(card: ModelCard) -> None:
    """By name, shape and dtype; one of a dtype that cannot be sent is refused."""
    made = sources.extra_inputs(card, seed=0)

    assert {"mask": (1, 4)} == {name: np.asarray(tensor.array).shape for name, tensor in made.items()}
    strange = dataclasses.replace(card, extra_inputs=(dataclasses.replace(card.extra_inputs[0], dtype="int64"),))
    with pytest.raises(ValueError, match="cannot be made up"):
        sources.extra_inputs(strange, seed=0)


def test_files_are_sent_as_they_are(tmp_path: Path, png: bytes) -> None:
    """A folder's images, byte for byte; what is not there is told at once."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png)

    source = sources.from_files([str(tmp_path)])

    assert [png, png] == [request.image.data for request in _requests(source)]
    assert "2 image files" == source.name
    with pytest.raises(ValueError, match="no images in"):
        sources.from_files([str(tmp_path / "*.jpg")])
    with pytest.raises(ValueError, match="standard input"):
        sources.from_files(["-"])
    with pytest.raises(InvalidInput, match="cannot read"):
        sources.from_files([str(tmp_path / "c.png")])

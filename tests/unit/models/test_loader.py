from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.nets import TinyNet
from support.servers import script_source
from torch import Tensor, nn

from camserve.server.cam.methods import METHODS
from camserve.server.errors import CamserveError
from camserve.server.models.config import ModelConfig, OutputConfig
from camserve.server.models.loader import load_model
from camserve.server.models.repository import ServedModel
from camserve.server.models.sources import ModelSource

CPU = torch.device("cpu")


def load(source: ModelSource, max_batch_rows: int = 4) -> ServedModel:
    """Loads on the CPU."""
    return load_model(source, device=CPU, max_batch_rows=max_batch_rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For archives."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny(folder) -> ModelSource:
    """TinyNet as a TorchScript archive."""
    return script_source("tiny", TinyNet(), folder, labels=("a", "b", "c", "d"))


def test_the_card_tells_what_was_found(tiny):
    """Name, classes, labels, layers with their maps, and every method: TinyNet can do all of them."""
    card = load(tiny).card

    assert ("tiny", "1", "torchscript", "cpu", "float32") == (
        card.name,
        card.version,
        card.kind,
        card.device,
        card.dtype,
    )
    assert (4, ("a", "b", "c", "d"), (3, 32, 32)) == (card.class_count, card.labels, card.recipe.shape)
    assert ((16, 8, 8), (8, 8)) == (card.layer("body").shape, card.layer("body").map_shape)
    assert card.layer("head").refusal
    assert {"legrad", "attention-rollout"} == set(METHODS) - {method.slug for method in card.methods if method.works}
    assert card.layer(card.default_layer).map_shape == (8, 8)
    assert card.rows_independent
    assert 4 == card.max_batch_rows


def test_loading_again_gives_the_same_digests_and_other_weights_others(tiny, folder):
    """Digests name a model: they depend on nothing but its code and weights."""
    once, again = load(tiny).card, load(tiny).card
    other = load(script_source("other", TinyNet(seed=1), folder)).card

    assert once.model_sha256 == again.model_sha256
    assert 64 == len(once.model_sha256)
    assert once.weights_sha256 != other.weights_sha256
    assert once.model_sha256 != other.model_sha256


@pytest.mark.parametrize(("on_card", "of_server", "expected"), [(None, 3, 3), (2, 3, 2), (8, 3, 3)])
def test_the_smallest_limit_of_rows_holds(tiny, on_card, of_server, expected):
    """The card may lower the server's limit, never raise it."""
    source = dataclasses.replace(tiny, config=tiny.config.model_copy(update={"max_batch": on_card}))

    assert expected == load(source, of_server).card.max_batch_rows


def test_a_default_layer_on_the_card_is_kept(tiny):
    """Whoever writes the card knows better than the probe."""
    source = dataclasses.replace(tiny, config=tiny.config.model_copy(update={"default_layer": "stem"}))

    assert "stem" == load(source).card.default_layer


class InDict(TinyNet):
    """Class scores under a key."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(b 3 h w) to scores and features."""
        features = self.body(self.stem(x))
        return {"features": features, "scores": self.head(features.mean((2, 3)))}


class Segments(nn.Module):
    """Scores for each pixel: not one row of class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 2 h w)."""
        return self.body(x)


def test_scores_in_a_dict_are_found_by_their_path(folder):
    """`output.path` names the key."""
    source = script_source("dict", InDict(), folder, output=OutputConfig(path="scores"))

    assert 4 == load(source).card.class_count


def refused(source: ModelSource) -> str:
    """What is said of a model that cannot be served."""
    with pytest.raises((ValueError, CamserveError)) as caught:
        load(source)
    return str(caught.value)


def changed(source: ModelSource, **config: object) -> ModelSource:
    """The same file with another card."""
    return dataclasses.replace(source, config=source.config.model_copy(update=config))


def test_labels_must_be_as_many_as_classes(tiny):
    """Fewer labels would shift or miss some."""
    said = refused(changed(tiny, labels=("a", "b")))

    assert "'tiny' has 4 classes, but its card has 2 labels; write one label for each class" in said


@pytest.mark.parametrize("layer", ["layer9", "head"])
def test_a_default_layer_must_give_maps(tiny, layer):
    """One that does not exist, and one without cells; those that would do are listed."""
    said = refused(changed(tiny, default_layer=layer))

    assert f"default_layer '{layer}' gives no map in model 'tiny'; layers: " in said
    assert "body" in said


def test_a_file_of_another_kind_is_refused(tmp_path):
    """The endings that are served are told."""
    path = tmp_path / "net.onnx"
    path.touch()

    said = refused(ModelSource(name="net", version="1", path=path, config=ModelConfig()))

    assert "'.onnx'; served are .pt (TorchScript) and .pt2 (torch.export)" in said


def test_weights_without_a_factory_are_refused(tmp_path):
    """Weights alone are no model."""
    path = tmp_path / "weights.safetensors"
    path.touch()

    said = refused(ModelSource(name="net", version="1", path=path, config=ModelConfig()))

    assert "weights alone need [factory] name in model.toml" in said


@pytest.mark.parametrize(
    ("name", "told"), [("net.pt", "save one with torch.jit.save"), ("net.pt2", "write it with torch.export.save")]
)
@pytest.mark.parametrize("data", [b"", b"this is no archive", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zip"])
def test_a_corrupt_archive_is_refused(tmp_path, name, told, data):
    """The text tells how to write a sound one."""
    path = tmp_path / name
    path.write_bytes(data)

    assert told in refused(ModelSource(name="net", version="1", path=path, config=ModelConfig()))


def test_a_cut_off_archive_is_refused(tiny, tmp_path):
    """A copy that broke off half way."""
    path = tmp_path / "net.pt"
    path.write_bytes(tiny.path.read_bytes()[:2000])

    assert "save one with torch.jit.save" in refused(dataclasses.replace(tiny, path=path))


def test_pickled_weights_are_refused(tmp_path):
    """`torch.save(net.state_dict())` is the most common file of that ending."""
    path = tmp_path / "net.pt"
    torch.save(TinyNet().state_dict(), path)

    assert "save one with torch.jit.save" in refused(
        ModelSource(name="net", version="1", path=path, config=ModelConfig())
    )


def test_a_model_without_class_scores_is_refused(folder):
    """A map of scores for each pixel is no row of class scores."""
    said = refused(script_source("segments", Segments(), folder))

    assert "does not return what its kind of output, classification, is read from" in said
    assert "output.path" in said


def test_a_path_that_leads_nowhere_is_refused(folder):
    """The keys that there are help."""
    said = refused(script_source("lost", InDict(), folder, output=OutputConfig(path="logits")))

    assert "logits" in said
    assert "scores" in said


def test_an_input_size_that_the_model_does_not_take_is_refused(folder):
    """The model's own complaint is passed on."""
    source = script_source("tensor", nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), folder)

    assert "Linear" in refused(source) or "shape" in refused(source)

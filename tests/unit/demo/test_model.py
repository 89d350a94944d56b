import tomllib
from pathlib import Path

import pytest
import torch
from torch.jit import ScriptModule

from camserve.server.demo.evaluate import Figures, evaluate, layer4_maps, normalised
from camserve.server.demo.network import DEFAULT_LAYER, MEAN, STD, front
from camserve.server.demo.surfaces import LABELS, SIZE, Surface


@pytest.fixture(scope="module")
def figures(shipped: ScriptModule, held_out: list[Surface]) -> Figures:
    """The shipped model's figures on two hundred held-out pictures."""
    return evaluate(shipped, held_out)


def test_shipped_model_tells_the_classes_of_unseen_materials(figures: Figures) -> None:
    """Accuracy on families it has never seen is what is promised."""
    assert figures.accuracy >= 0.95


def test_shipped_model_points_at_the_flaw(figures: Figures) -> None:
    """Over all flawed pictures, right or wrong, the better of two methods plays the pointing game as promised."""
    assert max(figures.pointing.values()) >= 0.95


def test_pointing_by_luck_is_far_from_the_promise(figures: Figures) -> None:
    """The flaws are small enough that pointing anywhere hits less than one time in six."""
    assert figures.chance < 1 / 6


def test_card_says_what_the_model_was_trained_with(card_path: Path) -> None:
    """Labels, size, normalisation and default layer of the card are those of the training."""
    card = tomllib.loads(card_path.read_text())
    assert list(LABELS) == card["labels"]
    assert [SIZE, SIZE] == card["input"]["size"]
    assert list(MEAN) == card["input"]["mean"]
    assert list(STD) == card["input"]["std"]
    assert DEFAULT_LAYER == card["default_layer"]


def test_archive_is_small_float32_and_in_evaluation_mode(archive_path: Path, shipped: ScriptModule) -> None:
    """At most 3 MB, nothing but float32 weights, and no dropout or batch statistics left on."""
    assert archive_path.stat().st_size <= 3_000_000
    assert {torch.float32} == {parameter.dtype for parameter in shipped.parameters()}
    assert {False} == {module.training for module in shipped.modules()}


def test_cam_and_grad_cam_agree_at_the_default_layer(shipped: ScriptModule, held_out: list[Surface]) -> None:
    """Pooling and one linear layer make Grad-CAM the class activation map divided by the number of cells."""
    inputs = normalised(held_out[:10]).contiguous()
    predicted, maps = layer4_maps(shipped, inputs)
    features = front(shipped, inputs)
    cam = torch.einsum("bcij,bc->bij", features, shipped.fc.weight[predicted]).relu()
    torch.testing.assert_close(maps["grad-cam"] * 400, cam, rtol=1e-4, atol=1e-4)
    assert (20, 20) == tuple(cam.shape[1:])


def test_a_row_alone_gives_what_it_gives_in_a_batch(shipped: ScriptModule, held_out: list[Surface]) -> None:
    """Batching moves float32 logits by no more than 1e-5 of their range."""
    inputs = normalised(held_out[:8]).contiguous()
    with torch.inference_mode():
        together = shipped(inputs)
        alone = torch.cat([shipped(inputs[row : row + 1]) for row in range(len(inputs))])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5 * float(together.max() - together.min()))

"""Segmentation through a real server: areas, regions and classes of a U-Net in both forms, and of torchvision's networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from support import architectures
from support.architectures import eager, scripted, served

from camserve.client import (
    Above,
    Box,
    Client,
    Difference,
    Heatmap,
    InvalidRequest,
    Kth,
    Region,
    Spec,
    TopK,
)
from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig, OutputConfig
from camserve.server.models.sources import ModelSource

# Half the source's width and height.
INPUT = InputConfig(size=(32, 48), mean=(0.0,), std=(1.0,))
DENSE = OutputConfig(kind="segmentation")
BOX = Box(8, 8, 20, 20)


@pytest.fixture(scope="module")
def client():
    """U-Nets."""

    def make(folder):
        return [
            eager("unet", "unet", INPUT, output=DENSE),
            eager("binary-unet", "binary_unet", INPUT, output=DENSE, labels=("flaw",)),
            scripted("scripted-unet", architectures.unet(), folder, INPUT, output=DENSE),
        ]

    with served(make) as client:
        yield client


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """96 wide and 64 high: bands of unlike brightness, and noise."""
    noise = np.random.default_rng(0).integers(0, 120, (64, 96, 3))
    return np.asarray(noise + (np.arange(96) // 24 * 45)[None, :, None], np.uint8)


@pytest.fixture(scope="module")
def predicted(picture) -> np.ndarray:
    """The class of each cell, (32 48), worked out beside the server."""
    return _logits(picture).argmax(axis=0)


def _logits(picture: np.ndarray) -> np.ndarray:
    small = torchvision.transforms.functional.resize(torchvision.transforms.functional.to_pil_image(picture), [32, 48])
    with torch.no_grad():
        return architectures.unet()(torchvision.transforms.functional.to_tensor(small)[None])[0].numpy()


def maps(client: Client, model: str, picture: np.ndarray, *specs: Spec) -> tuple[Heatmap, ...]:
    """The maps of specs that all succeed."""
    result = client.explain(picture, model=model, specs=specs)
    result.raise_for_errors()
    return result.heatmaps


def test_the_prediction_is_each_class_and_its_area(client, picture, predicted):
    """Largest area first, as a share of the cells; the logit is the mean over the picture."""
    said = client.explain(picture, model="unet", top_k=3).prediction.classes

    areas = np.bincount(predicted.ravel(), minlength=3) / predicted.size
    order = np.argsort(-areas, kind="stable")
    assert order.tolist() == [item.class_index for item in said]
    assert areas[order].tolist() == pytest.approx([item.probability for item in said])
    assert _logits(picture).mean(axis=(1, 2))[order] == pytest.approx([item.logit for item in said], abs=1e-5)


@pytest.mark.parametrize("model", ["unet", "scripted-unet"])
def test_every_target_is_the_sum_over_its_cells(client, picture, predicted, model):
    """Predicted, class, box, mask and point: the score that comes back is that of the class over those cells."""
    mask = np.zeros((64, 96))
    mask[10:30, 20:60] = 1
    first = int(np.bincount(predicted.ravel()).argmax())
    logits = _logits(picture)
    in_box = np.zeros((32, 48), bool)
    in_box[4:14, 4:14] = True
    in_mask = np.zeros((32, 48), bool)
    in_mask[5:15, 10:30] = True
    at_point = np.zeros((32, 48), bool)
    at_point[10, 25] = True
    most = int(np.bincount(predicted[in_box]).argmax())
    expected = [
        (None, first, predicted == first),
        (1 - first % 2, 1 - first % 2, predicted == 1 - first % 2),
        (Region(box=BOX), most, in_box),
        (Region(mask=mask, class_index=0), 0, in_mask),
        (Region(point=(50, 20)), int(predicted[10, 25]), at_point),
        (Region(class_index=first), first, predicted == first),
    ]

    got = maps(client, model, picture, *(Spec("grad-cam", target=target, rectify=False) for target, _, _ in expected))

    for heatmap, (_, index, cells) in zip(got, expected, strict=True):
        assert (index, int(cells.sum())) == (heatmap.target.class_index, heatmap.target.cells)
        assert float(logits[index][cells].sum()) == pytest.approx(heatmap.target.value, rel=1e-4, abs=1e-3)


def test_several_classes_come_as_several_maps(client, picture, predicted):
    """By area; a threshold is of the area; a difference is over the cells of its first class."""
    areas = np.bincount(predicted.ravel(), minlength=3) / predicted.size
    order = [int(index) for index in np.argsort(-areas, kind="stable") if areas[index] > 0]
    second = float(np.sort(areas)[-2])

    got = maps(
        client,
        "unet",
        picture,
        Spec("layercam", target=TopK(3)),
        Spec("layercam", target=Kth(2)),
        Spec("layercam", target=Above(second * 0.99)),
        Spec("layercam", target=Difference(order[0], order[1])),
    )

    found = [[item.target.class_index for item in got if item.spec_index == place] for place in range(4)]
    assert [order, order[1:2], order[:2], order[:1]] == found
    assert order[1] == got[-1].target.other_class_index


def test_scores_of_cells_may_be_probabilities(client, picture, predicted):
    """Softmax is summed over the cells of the class: at most one for each."""
    softmax, rest = maps(
        client, "unet", picture, Spec("grad-cam", score="softmax"), Spec("grad-cam", score="rest", rectify=False)
    )

    assert softmax.target.cells / 3 < softmax.target.value < softmax.target.cells
    assert "rest" == rest.target.score
    assert rest.values.any()


def test_layers_of_every_resolution_are_tapped(client, picture):
    """The card's stages run from the bottleneck up to the picture's size again."""
    stages = client.model("unet").stages
    got = maps(client, "unet", picture, *(Spec("grad-cam", layers=[stage], rectify=False) for stage in stages))

    assert ("bottleneck", "up2", "up1") == tuple(stages)
    assert [(8, 12), (16, 24), (32, 48)] == [heatmap.values.shape for heatmap in got]
    assert all(heatmap.raw_max > heatmap.raw_min for heatmap in got)


@pytest.mark.parametrize("model", ["unet", "scripted-unet"])
def test_methods_made_for_regions(client, picture, model):
    """Seg-XRes-CAM with windows of one cell is HiResCAM, with the whole map it is Grad-CAM; Score-CAM is about the region."""
    region = Region(box=BOX)
    common = {"layers": ["bottleneck"], "target": region, "rectify": False, "encoding": "float32"}
    specs = [
        Spec("seg-xres-cam", window=1, **common),
        Spec("hirescam", **common),
        Spec("score-cam", **common),
        Spec("seg-eigen-cam", **common),
        Spec("ablation-cam", **common),
        Spec("guided-backprop", target=region, encoding="float32"),
    ]

    fine, hires, score, *others = maps(client, model, picture, *specs)

    np.testing.assert_allclose(fine.values, hires.values, rtol=1e-4, atol=1e-5 * float(np.abs(hires.values).max()))
    assert 100 == score.target.cells
    assert all(np.isfinite(item.values).all() and item.values.any() for item in (score, *others))
    # Convolutions of 3 x 3 down to the bottleneck and up again see at most 22 cells beyond the region.
    _, columns = np.nonzero(others[-1].strength)
    assert columns.max() < 14 + 24 <= 48


def test_a_model_of_one_class_says_where_it_is(client, picture):
    """Class 0 alone, where its logit is above 0; a threshold, a region and a probability work, a second class does not exist."""
    region, whole = maps(
        client,
        "binary-unet",
        picture,
        Spec("grad-cam", target=Region(box=BOX)),
        Spec("grad-cam", target="flaw", score="softmax", rectify=False),
    )

    said = client.explain(picture, model="binary-unet").prediction
    assert (0, "flaw") == (said.classes[0].class_index, said.label)
    assert (0, 100) == (region.target.class_index, region.target.cells)
    assert round(said.classes[0].probability * 32 * 48) == whole.target.cells
    with pytest.raises(InvalidRequest, match="must be from 0 to 0"):
        client.explain(picture, model="binary-unet", specs=[Spec("grad-cam", target=1)])


def test_a_class_that_is_nowhere_has_no_cells(client):
    """The refusal says how else to ask about it."""
    gray = np.full((64, 96, 3), 64, np.uint8)
    said = client.explain(gray, model="unet", top_k=3).prediction.classes

    assert (2, 0.0) == (said[2].class_index, said[2].probability)
    with pytest.raises(InvalidRequest, match=r"no cell is predicted as class 2.*name the pixels.*target.region"):
        client.explain(gray, model="unet", specs=[Spec("grad-cam", target=2)]).raise_for_errors()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["eager", "scripted"])
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_torchvision_networks_at_64_pixels(name, form, picture):
    """Their output is a dict, of which the card names one tensor; the backbone's stages are tapped."""
    output = OutputConfig(kind="segmentation", path="out")
    square = InputConfig(size=(64, 64))

    def make(folder):
        if form == "eager":
            factory = FactoryConfig(name=f"torchvision:{name}", random_seed=0)
            return [
                ModelSource(
                    name="big",
                    version="1",
                    path=None,
                    config=ModelConfig(factory=factory, input=square, output=output),
                )
            ]
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        return [scripted("big", module, folder, square, output=output)]

    common = {"layers": ["backbone.layer3"], "encoding": "float32", "rectify": False}
    with served(make) as client:
        card = client.model("big")
        result = client.explain(
            picture,
            model="big",
            specs=[
                Spec("grad-cam"),
                Spec("grad-cam", target=Region(box=BOX), **common),
                Spec("seg-xres-cam", target=Region(point=(50, 20)), window=3, **common),
                Spec("score-cam", target=Region(box=BOX), channels=4, **common),
                Spec("layercam", target=TopK(2), **common),
            ],
            top_k=5,
        )

    result.raise_for_errors()
    assert 21 == card.class_count
    assert 1.0 == pytest.approx(sum(item.probability for item in result.prediction.classes), abs=0.2)
    assert all(heatmap.values.any() for heatmap in result.heatmaps)
    assert {(8, 8)} == {heatmap.values.shape for heatmap in result.heatmaps[1:]}

"""Detectors of torchvision through a real server, eager and scripted: detections on the source, matched boxes, backbones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from support import architectures
from support.architectures import eager, scripted, served

from camserve.client import Above, Box, Client, DetectionBox, FailedPrecondition, Heatmap, InvalidRequest, Spec, TopK
from camserve.server.models.config import InputConfig, OutputConfig

# Said once by torchvision's scripted code; the readout takes either form.
pytestmark = pytest.mark.filterwarnings("ignore:.* always returns a:UserWarning")

# Half the source's width and height.
INPUT = InputConfig(size=(64, 96), mean=(0.0,), std=(1.0,))
FOUND = OutputConfig(kind="detection")
FORMS = ("detector", "scripted-detector")


@pytest.fixture(scope="module")
def client():
    """A small Faster R-CNN in both forms."""

    def make(folder):
        return [
            eager("detector", "detector", INPUT, output=FOUND),
            scripted("scripted-detector", architectures.detector(), folder, INPUT, output=FOUND),
            eager("labelled", "detector", INPUT, output=FOUND, labels=("background", "bolt", "nut", "washer")),
        ]

    with served(make) as client:
        yield client


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """192 wide and 128 high: two bright objects on noise."""
    pixels = np.random.default_rng(1).integers(0, 60, (128, 192, 3))
    pixels[20:70, 30:90] += 180
    pixels[60:110, 120:170, 0] += 120
    return np.asarray(pixels, np.uint8)


def maps(client: Client, model: str, picture: np.ndarray, *specs: Spec) -> tuple[Heatmap, ...]:
    """The maps of specs that all succeed."""
    result = client.explain(picture, model=model, specs=specs)
    result.raise_for_errors()
    return result.heatmaps


@pytest.mark.parametrize("model", FORMS)
def test_detections_come_in_pixels_of_the_source(client, picture, model):
    """Best first, as torchvision returns them for the resized picture, twice as large."""
    functional = torchvision.transforms.functional
    small = functional.to_tensor(functional.resize(functional.to_pil_image(picture), [64, 96]))
    with torch.no_grad():
        (expected,) = architectures.detector()(small[None])

    found = client.explain(picture, model=model, top_k=20).prediction.detections

    assert 1 < len(found) == len(expected["scores"])
    assert expected["scores"].tolist() == pytest.approx([item.score for item in found], abs=1e-4)
    assert expected["labels"].tolist() == [item.class_index for item in found]
    for item, (left, top, right, bottom) in zip(found, (2 * expected["boxes"]).tolist(), strict=True):
        # Rounded outwards.
        assert 0 <= left - item.box.left < 1.001
        assert 0 <= top - item.box.top < 1.001
        assert 0 <= item.box.left + item.box.width - right < 1.001
        assert 0 <= item.box.top + item.box.height - bottom < 1.001


@pytest.mark.parametrize("model", FORMS)
def test_a_box_is_matched_with_the_model_s_own_detection(client, picture, model):
    """What comes back is that detection, its overlap with what was asked for, and its score."""
    found = client.explain(picture, model=model, top_k=20).prediction.detections
    wanted = found[1]
    moved = Box(wanted.box.left + 4, wanted.box.top, wanted.box.width, wanted.box.height)

    exact, near, best = maps(
        client,
        model,
        picture,
        Spec("grad-cam", target=DetectionBox(wanted.box, class_index=wanted.class_index), rectify=False),
        Spec("grad-cam", target=DetectionBox(moved, class_index=wanted.class_index), rectify=False),
        Spec("grad-cam", rectify=False),
    )

    assert (wanted.box, wanted.class_index) == (exact.target.detection.box, exact.target.class_index)
    assert wanted.score == pytest.approx(exact.target.value, abs=1e-5)
    assert 0.5 < near.target.iou < exact.target.iou <= 1
    assert found[0].box == best.target.detection.box
    assert best.target.iou is None
    assert exact.raw_max > exact.raw_min


def test_a_box_that_nothing_overlaps_is_refused_with_the_nearest(client, picture):
    """The text tells the best overlap, which detection has it, and what to do."""
    with pytest.raises(InvalidRequest, match=r"by 0.9 or more: the best overlap is 0.*nearest.*lower min_iou"):
        client.explain(
            picture, model="detector", specs=[Spec("grad-cam", target=DetectionBox(Box(0, 0, 3, 3), min_iou=0.9))]
        ).raise_for_errors()


def test_detections_are_ranked_and_filtered(client, picture):
    """The two best, those above a threshold, the best of a class; labels are the card's."""
    found = client.explain(picture, model="labelled", top_k=20).prediction.detections
    scores = [item.score for item in found]
    wanted = found[-1]

    got = maps(
        client,
        "labelled",
        picture,
        Spec("layercam", target=TopK(2)),
        Spec("layercam", target=Above(scores[1] - 1e-4)),
        Spec("layercam", target=wanted.label),
    )

    told = [[item.target.detection.box for item in got if item.spec_index == place] for place in range(3)]
    best = next(item for item in found if item.class_index == wanted.class_index)
    above = [item.box for item in found if item.score > scores[1] - 1e-4]
    assert [[found[0].box, found[1].box], above, [best.box]] == told
    assert wanted.label == got[-1].target.label


@pytest.mark.parametrize("model", FORMS)
def test_every_kind_of_method_explains_a_detection(client, picture, model):
    """Gradients, tries of activations and of inputs; a try in which nothing overlaps the box counts as 0."""
    methods = ["grad-cam", "hirescam", "eigen-cam", "score-cam", "ablation-cam", "vanilla-backprop"]
    specs = [*(Spec(slug, rectify=False) for slug in methods), Spec("rise", samples=16), Spec("occlusion", window=24)]

    got = maps(client, model, picture, *specs)

    assert len(specs) == len(got)
    assert all(item.raw_max > item.raw_min for item in got)


@pytest.mark.parametrize("model", FORMS)
def test_the_default_layer_is_in_front_of_the_pyramid(client, model):
    """Every detection depends on it, whichever level it was found at; the card counts no classes that the model does not tell."""
    card = client.model(model)

    assert "backbone.body.stage2" == card.default_layer
    assert ["backbone.body.stem", "backbone.body.stage1", "backbone.body.stage2"] == list(card.stages)
    assert 0 == card.class_count
    assert 4 == client.model("labelled").class_count


def test_outputs_of_the_pyramid_are_tapped_by_their_key(client, picture):
    """`backbone.fpn:0` is its finest level; what a detection was not found at leaves an empty map, and says so."""
    fine, coarse = maps(
        client,
        "detector",
        picture,
        Spec("eigen-cam", layers=["backbone.fpn:0"]),
        Spec("eigen-cam", layers=["backbone.fpn:1"]),
    )

    assert [(16, 24), (8, 12)] == [fine.values.shape, coarse.values.shape]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (Spec("grad-cam", score="softmax"), "score 'softmax' does not fit model 'detector'"),
        (Spec("finer-cam"), "finer-cam"),
        (Spec("cam"), "cam does not work on model 'detector'"),
    ],
)
def test_what_detections_do_not_have_is_refused(client, picture, spec, told):
    """No softmax, no other classes, no linear head."""
    with pytest.raises((FailedPrecondition, InvalidRequest), match=told):
        client.explain(picture, model="detector", specs=[spec]).raise_for_errors()


def frcnn() -> torch.nn.Module:
    """Torchvision's smallest Faster R-CNN, random weights."""
    torch.manual_seed(0)
    return torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96, box_score_thresh=0.01
    ).eval()


def retinanet() -> torch.nn.Module:
    """Torchvision's RetinaNet over ResNet-50, random weights."""
    torch.manual_seed(0)
    return torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96, score_thresh=0.0
    ).eval()


def ssdlite() -> torch.nn.Module:
    """Torchvision's SSDlite, which resizes everything to 320 x 320, random weights."""
    torch.manual_seed(0)
    return torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, score_thresh=0.01
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["eager", "scripted"])
@pytest.mark.parametrize(
    ("build", "default", "layer", "grid"),
    [
        (frcnn, "backbone.body", "backbone.body.16", (2, 3)),
        (retinanet, "backbone.body.layer4", "backbone.body.layer4", (2, 3)),
        (ssdlite, "backbone.features", "backbone.features.0", (20, 20)),
    ],
)
def test_torchvision_s_detectors(build, default, layer, grid, form, picture):
    """Their predictions, a matched box and its gradient; the default layer lies in the backbone."""

    def make(folder):
        if form == "scripted":
            return [scripted("found", build(), folder, INPUT, output=FOUND)]
        source = eager("found", "detector", INPUT, output=FOUND)
        name = f"{__name__}:{build.__name__}"
        factory = source.config.factory.model_copy(update={"name": name, "allowed_imports": (__name__,)})
        return [
            type(source)(
                name="found", version="1", path=None, config=source.config.model_copy(update={"factory": factory})
            )
        ]

    with served(make) as client:
        card = client.model("found")
        found = client.explain(picture, model="found").prediction.detections
        result = client.explain(
            picture,
            model="found",
            specs=[
                Spec("eigen-cam", layers=[layer]),
                Spec("grad-cam", layers=[layer], target=DetectionBox(found[0].box), rectify=False),
                Spec("score-cam", layers=[layer], channels=2, target=DetectionBox(found[0].box)),
            ],
        )

    result.raise_for_errors()
    assert card.default_layer.startswith(default)
    assert {grid} == {item.values.shape for item in result.heatmaps}
    assert result.heatmaps[1].target.iou > 0.8
    assert result.heatmaps[1].raw_max > result.heatmaps[1].raw_min

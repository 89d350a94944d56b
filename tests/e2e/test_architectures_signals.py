"""Signals (b c t) and volumes (b c d h w), sent as tensors: maps over the same axes, by every method that pictures have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import architectures
from support.architectures import eager, scripted, served

from camserve.client import Client, Heatmap, InvalidRequest, Spec, TensorInput, Unimplemented
from camserve.server.cam.methods import METHODS, Layerwise
from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

LAYERWISE = [slug for slug, method in METHODS.items() if isinstance(method.arithmetic, Layerwise)]
SIGNAL, VOLUME = (2, 64), (2, 8, 8, 12)
# Smaller than usual; an occluding patch is else an eighth of the shorter side, which a singleton axis would make 1.
BUDGETS = {
    "rise": {"samples": 8},
    "smoothgrad": {"samples": 4},
    "ss-cam": {"samples": 4},
    "occlusion": {"window": 4, "stride": 2},
}


def tensors(*shape: int) -> InputConfig:
    """A card's `[input]` for a model that takes tensors of one shape."""
    return InputConfig(channels="none", shape=shape)


@pytest.fixture(scope="module")
def client():
    """Signals and volumes, in both forms, and the same numbers as pictures."""

    def make(folder):
        return [
            eager("signal", "signal", tensors(*SIGNAL)),
            eager("flat-signal", "flat_signal", tensors(2, 1, 64)),
            eager("volume", "volume", tensors(*VOLUME)),
            eager("picture", "flat_volume", tensors(2, 16, 24)),
            eager("deep-picture", "deep_picture", tensors(2, 1, 16, 24)),
            scripted("scripted-signal", architectures.signal(), folder, tensors(*SIGNAL)),
            scripted("scripted-volume", architectures.volume(), folder, tensors(*VOLUME)),
        ]

    with served(make, max_specs=64) as client:
        yield client


def noise(*shape: int) -> TensorInput:
    """An input of that shape, always the same."""
    return TensorInput(np.random.default_rng(3).normal(size=shape).astype(np.float32))


def one_map(client: Client, model: str, image: TensorInput, spec: Spec) -> Heatmap:
    """The first map of a spec that succeeds."""
    result = client.explain(image, model=model, specs=[spec])
    result.raise_for_errors()
    return result.heatmaps[0]


@pytest.mark.parametrize(
    ("model", "shape", "grid", "axes"),
    [
        ("signal", SIGNAL, (16,), ("t",)),
        ("volume", VOLUME, (2, 2, 3), ("d", "h", "w")),
        ("scripted-signal", SIGNAL, (16,), ("t",)),
        ("scripted-volume", VOLUME, (2, 2, 3), ("d", "h", "w")),
    ],
)
def test_every_method_maps_the_axes_of_the_input(client, model, shape, grid, axes):
    """The map lies on the layer's cells, or on the input's with its channels last; it is not empty by mistake."""
    slugs = [slug for slug in METHODS if slug not in {"legrad", "attention-rollout"}]
    specs = [Spec(slug, encoding="float32", rectify=False, **BUDGETS.get(slug, {})) for slug in slugs]

    result = client.explain(noise(*shape), model=model, specs=specs)

    result.raise_for_errors()
    assert set(range(len(slugs))) == {heatmap.spec_index for heatmap in result.heatmaps}
    for got in result.heatmaps:
        if got.has_channels:
            assert ((*axes, "c"), (*shape[1:], shape[0])) == (got.axes, got.values.shape)
        else:
            is_of_layer = got.layers and got.method != "sess"  # Which magnifies windows of the input.
            assert (axes, grid if is_of_layer else shape[1:]) == (got.axes, got.values.shape)
        assert np.isfinite(got.values).all()
        assert got.values.any(), got.method
        assert got.geometry is None


@pytest.mark.parametrize(
    ("model", "shape", "flat_model", "flat_shape"),
    [("signal", SIGNAL, "flat-signal", (2, 1, 64)), ("picture", (2, 16, 24), "deep-picture", (2, 1, 16, 24))],
)
def test_an_axis_of_one_cell_more_changes_nothing(client, model, shape, flat_model, flat_shape):
    """A signal is a picture of one row, and a picture a volume of one slice: the maps have the same numbers."""
    image = noise(*shape)
    deep = TensorInput(np.asarray(image.array).reshape(flat_shape))
    slugs = [*LAYERWISE, "score-cam", "occlusion", "vanilla-backprop", "fullgrad"]
    specs = [Spec(slug, encoding="float32", rectify=False, **BUDGETS.get(slug, {})) for slug in slugs]

    expected, got = (client.explain(one, model=name, specs=specs) for one, name in ((image, model), (deep, flat_model)))

    expected.raise_for_errors()
    got.raise_for_errors()
    assert len(slugs) == len(expected.heatmaps)
    for one, other in zip(expected.heatmaps, got.heatmaps, strict=True):
        assert (1, *one.values.shape) == other.values.shape
        span = float(np.abs(one.values).max())
        np.testing.assert_allclose(other.values[0], one.values, rtol=1e-3, atol=1e-4 * span, err_msg=one.method)


def test_maps_of_several_layers_are_fused_along_time(client):
    """The coarser is enlarged to the finer one's steps."""
    got = one_map(client, "signal", noise(*SIGNAL), Spec("layercam", layers=["stem", "body"], encoding="float32"))

    assert (32,) == got.values.shape


def test_both_forms_of_a_volume_give_the_same_map(client):
    """Eager and scripted networks of the same weights."""
    spec = Spec("grad-cam", rectify=False, encoding="float32")

    expected = one_map(client, "volume", noise(*VOLUME), spec)
    got = one_map(client, "scripted-volume", noise(*VOLUME), spec)

    np.testing.assert_allclose(got.values, expected.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (Spec("grad-cam", region_threshold=0.5), "are boxes in pictures"),
        (Spec("grad-cam", size="input"), "dimensions"),
        (Spec("grad-cam", encoding="png8"), "dimensions"),
        (Spec("grad-cam", encoding="overlay-png"), "needs an image"),
    ],
)
def test_what_only_pictures_have_is_refused(client, spec, told):
    """Boxes, files and other sizes, for the reason that the map has one dimension."""
    with pytest.raises((InvalidRequest, Unimplemented), match=told):
        client.explain(noise(*SIGNAL), model="signal", specs=[spec]).raise_for_errors()


def test_a_picture_is_refused_by_a_model_of_signals(client):
    """The text says what to send instead."""
    with pytest.raises(InvalidRequest, match=r"does not take images; send a tensor of float32 \(2, 64\)"):
        client.explain(np.zeros((8, 8, 3), np.uint8), model="signal")
    with pytest.raises(InvalidRequest, match=r"tensor of float32 \(2, 32\).*takes float32 \(2, 64\)"):
        client.explain(noise(2, 32), model="signal")


@pytest.mark.slow
def test_a_clip_through_a_video_network():
    """Torchvision's r3d_18 on eight frames: maps over time, height and width at every stage."""
    factory = FactoryConfig(name="torchvision:r3d_18", random_seed=0)
    config = ModelConfig(factory=factory, input=tensors(3, 8, 32, 32))
    clip = noise(3, 8, 32, 32)
    with served(lambda _folder: [ModelSource(name="clip", version="1", path=None, config=config)]) as client:
        stages = client.model("clip").stages

        result = client.explain(
            clip,
            model="clip",
            specs=[Spec("grad-cam", layers=[stage], encoding="float32", rectify=False) for stage in stages]
            + [Spec("cam"), Spec("score-cam", channels=4), Spec("occlusion", window=8, stride=8)],
        )

    result.raise_for_errors()
    assert {"layer1", "layer2", "layer3"} <= set(stages)
    assert {("d", "h", "w")} == {heatmap.axes for heatmap in result.heatmaps}
    assert (8, 16, 16) == result.heatmaps[stages.index("layer1")].values.shape
    assert all(np.abs(heatmap.values).max() > 0 for heatmap in result.heatmaps[: len(stages)])
    assert torch.is_grad_enabled()

"""Inputs that are not square, odd, or of any size through a real server: each row keeps its size, and passes are of one size."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
import torch
from support import architectures
from support.architectures import eager, scripted, served
from support.servers import Metrics

from camserve.client import (
    Box,
    Client,
    FailedPrecondition,
    Heatmap,
    InvalidRequest,
    Overloaded,
    Spec,
    TensorInput,
)
from camserve.server.models.config import InputConfig, read_config

ODD = InputConfig(size=(33, 47), mean=(0.0,), std=(1.0,))
ANY = InputConfig(size=(32, 32), mean=(0.0,), std=(1.0,), resize="none", variable=True)
TENSORS = InputConfig(channels="none", shape=(2, 64), variable=True)
SIZES = ((32, 32), (32, 48), (33, 47), (17, 90), (64, 64))


@pytest.fixture(scope="module")
def client():
    """Networks of any size, and one of an odd size."""

    def make(folder):
        return [
            eager("odd", "pictures", ODD),
            eager("any", "pictures", ANY),
            scripted("scripted-any", architectures.pictures(), folder, ANY),
            eager("signal", "signal", TENSORS),
            eager("vit", "vit_of_any_size", InputConfig(size=(32, 64), resize="none", variable=True)),
        ]

    with served(make, max_image_pixels=10_000, max_held_bytes=3_000_000) as client:
        yield client


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise of a size."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)


def expected_map(image: np.ndarray) -> np.ndarray:
    """Signed HiResCAM at `body` of the predicted class, worked out here."""
    module = architectures.pictures()
    kept: list[torch.Tensor] = []
    module.body.register_forward_hook(lambda _m, _i, output: kept.append(output))
    logits = module(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0]
    (gradient,) = torch.autograd.grad(logits.max(), kept[0])
    return (gradient * kept[0].detach()).sum(1)[0].numpy()


def hirescam(client: Client, model: str, image: object, **options: object) -> Heatmap:
    """Of `body`, signed."""
    spec = Spec("hirescam", layers=["body"], rectify=False, encoding="float32", **options)
    result = client.explain(image, model=model, specs=[spec])
    result.raise_for_errors()
    return result.heatmaps[0]


def test_an_odd_size_that_is_not_square(client):
    """33 x 47 pixels are 9 x 12 cells; at the input's and the source's size the map is theirs."""
    layer = hirescam(client, "odd", picture(66, 94))
    inner = hirescam(client, "odd", picture(66, 94), size="input")
    outer = hirescam(client, "odd", picture(66, 94), size="source")

    assert [(9, 12), (33, 47), (66, 94)] == [item.values.shape for item in (layer, inner, outer)]
    np.testing.assert_allclose(
        hirescam(client, "odd", picture(33, 47)).values, expected_map(picture(33, 47)), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("model", ["any", "scripted-any"])
@pytest.mark.parametrize("size", SIZES)
def test_images_keep_their_own_size(client, model, size):
    """Nothing is resized: the map is that of the pixels as they were sent, and lies on all of them."""
    got = hirescam(client, model, picture(*size))

    np.testing.assert_allclose(got.values, expected_map(picture(*size)), rtol=1e-3, atol=1e-6)
    assert (got.geometry.source_height, got.geometry.source_width) == size
    assert size == got.on_source().shape


def test_tensors_may_have_any_size_of_space(client):
    """As images; the input's size is that of what was sent."""
    image = picture(21, 53)
    values = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / np.float32(255)

    got = hirescam(client, "any", TensorInput(values), size="input")

    assert (21, 53) == got.values.shape
    signal = client.explain(
        TensorInput(np.random.default_rng(0).normal(size=(2, 101)).astype(np.float32)),
        model="signal",
        specs=[Spec("grad-cam"), Spec("occlusion")],
    )
    signal.raise_for_errors()
    assert [(26,), (101,)] == [item.values.shape for item in signal.heatmaps]


def test_a_region_of_interest_is_a_row_of_its_own_size(client):
    """The part is looked at as it is."""
    whole = picture(50, 60)
    result = client.explain(
        whole,
        model="any",
        specs=[Spec("hirescam", layers=["body"], rectify=False, encoding="float32")],
        region_of_interest=Box(10, 5, 40, 20),
    )

    np.testing.assert_allclose(result.heatmaps[0].values, expected_map(whole[5:25, 10:50].copy()), rtol=1e-3, atol=1e-6)


def test_methods_of_every_kind_take_any_size(client):
    """Layers, tries and the input."""
    slugs = ("grad-cam", "cam", "eigen-cam", "score-cam", "ablation-cam", "smoothgrad", "fullgrad", "rise", "occlusion")
    budgets = {"rise": {"samples": 8}, "smoothgrad": {"samples": 4}, "occlusion": {"window": 16, "stride": 16}}
    specs = [Spec(slug, rectify=False, **budgets.get(slug, {})) for slug in slugs]

    result = client.explain(picture(33, 47), model="any", specs=specs)

    result.raise_for_errors()
    assert {(9, 12), (33, 47), (33, 47, 3)} == {item.values.shape for item in result.heatmaps}


def test_passes_are_of_one_size(client, serve):
    """Callers of several sizes at once get what they would have got alone; rows of one size share passes."""
    server = serve(eager("any", "pictures", ANY), batch_window_seconds=0.05)
    jobs = [picture(*SIZES[place % 3], seed=place) for place in range(24)]
    with Client(server.target) as crowd, concurrent.futures.ThreadPoolExecutor(24) as callers:
        got = list(callers.map(lambda image: hirescam(crowd, "any", image), jobs))

    for image, heatmap in zip(jobs, got, strict=True):
        np.testing.assert_allclose(heatmap.values, expected_map(image), rtol=1e-3, atol=1e-6)
    passes = Metrics(server).value("camserve_batch_rows_count", model="any")
    assert 3 <= passes < 24
    assert 24 == Metrics(server).value("camserve_batch_rows_sum", model="any")


def test_channels_and_pixels_are_still_limited(client):
    """The axis of channels and the number of axes are the model's; the server's limits hold for every size."""
    for shape in ((2, 32, 32), (3, 32), (1, 3, 32, 32)):
        with pytest.raises(InvalidRequest, match=r"takes float32 \(3, any, any\)"):
            client.explain(TensorInput(np.zeros(shape, np.float32)), model="any")
    with pytest.raises(InvalidRequest, match="over the limit of 10000"):
        client.explain(picture(101, 100), model="any")
    with pytest.raises(InvalidRequest, match="over the limit of 10000"):
        client.explain(TensorInput(np.zeros((3, 101, 100), np.float32)), model="any")


def test_the_door_counts_rows_of_their_actual_size(serve):
    """A row of 12 MB is refused by a server that holds 10 MB, though the card's own size would fit."""
    server = serve(eager("any", "pictures", ANY), max_held_bytes=10_000_000)
    with Client(server.target, retries=0) as client:
        client.explain(TensorInput(np.zeros((3, 300, 300), np.uint8)), model="any")
        with pytest.raises((InvalidRequest, Overloaded)):
            client.explain(TensorInput(np.zeros((3, 1000, 1000), np.uint8)), model="any")


def test_tokens_are_laid_on_the_size_of_the_card_alone(client):
    """How 50 tokens of another size lie is not known; layers that keep their axes give maps."""
    small, large = (picture(height, 2 * height) for height in (32, 48))
    client.explain(small, model="vit", specs=["grad-cam"]).raise_for_errors()

    told = r"has 73 tokens for this input.*1 \+ 4 x 8 only; send an input of the size on the model's card"
    for slug in ("grad-cam", "eigen-cam", "score-cam"):
        with pytest.raises(FailedPrecondition, match=told):
            client.explain(large, model="vit", specs=[slug]).raise_for_errors()
    result = client.explain(large, model="vit", specs=[Spec("grad-cam", layers=["patch_embed.proj"])])
    result.raise_for_errors()
    assert (6, 12) == result.heatmaps[0].values.shape


def test_a_card_may_not_promise_what_the_model_does_not_keep(tmp_path):
    """A head of fixed size, and images without resizing for one size, are refused at load."""
    fixed = InputConfig(size=(32, 32), variable=True)
    with (
        pytest.raises(ValueError, match=r"'fixed' does not take inputs of other sizes: \(3, 64, 64\) failed with"),
        served(lambda _folder: [eager("fixed", "fixed_head", fixed)]),
    ):
        pass
    card = tmp_path / "model.toml"
    card.write_text('[input]\nresize = "none"\n')
    with pytest.raises(ValueError, match="set variable = true"):
        read_config(card)

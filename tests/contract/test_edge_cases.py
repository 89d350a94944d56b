"""The ten edge cases of CAM software, each held to a defined answer.

Where each one is shown; "models" is `test_edge_cases_models.py`:

 1. constant, 1 x 1, all-negative and NaN maps, no gradient: here, `test_a_map_of_nothing_is_flagged` and those after it;
    unit/cam/test_maps.py for every flag; test_refusals.py for gradients that end on the way.
 2. a module used twice, layers in any order: here, `test_every_call_is_its_own_place`, `test_the_order_of_layers`.
 3. mixed targets: here, `test_targets_of_neighbours_do_not_mix`, `test_wrong_targets_are_errors`; test_refusals.py.
 4. saturated softmax, tiny scales: here, `test_a_saturated_target`, `test_scale_does_not_matter`.
 5. in-place and functional ReLU, concatenation: models, `test_the_value_before_it_is_written_to`; test_refusals.py for gates.
 6. frozen, folded, quantised and traced models: models, `test_gradients_of_archives_are_exact` and those after it.
 7. transformers: models, `test_tokens_lie_on_their_grid`, `test_the_last_block_has_no_gradient_at_its_patches`;
    unit/engine/test_layout.py for windows and ambiguous shapes.
 8. geometry: models, `test_height_comes_before_width`; unit/test_geometry.py, unit/test_resize.py and e2e/test_options.py.
 9. the storm: e2e/test_storm.py and e2e/test_storm_amplified.py.
10. singular weights: models, `test_sums_that_vanish`, `test_half_precision_keeps_small_gradients`; unit/cam/test_weights.py
    for each formula, contract/test_identities.py for average pooling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.edges import (
    ROW,
    assert_close,
    evidence,
    explained,
    raw,
    shared,
    values_of,
)
from support.nets import TinyNet
from support.refusing import KINDS, served_as
from support.servers import script_source, settings
from torch import Tensor, nn

from camserve.client import AsyncClient, InvalidRequest, NotFound, Result, Spec, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.local import LocalExplainer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks on several threads wait more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# 1. Maps of nothing.


def flagged(network: nn.Module, folder: Path, *specs: Spec, row: npt.NDArray[np.float32] = ROW) -> list[set[str]]:
    """The flags of each map; every value of every map is finite."""
    result = explained(script_source("edge", network, folder), *specs, row=row)
    assert all(np.isfinite(values).all() for values in values_of(result))
    return [set(heatmap.flags) for heatmap in result.heatmaps]


LAYERED = ("grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "eigen-cam", "score-cam", "ablation-cam")


@pytest.mark.parametrize("normalisation", ["none", "min-max"])
def test_a_map_of_nothing_is_flagged(tmp_path, normalisation):
    """A dead layer and a head without weights: a map of zeros that says so, whatever the method."""
    network = TinyNet()
    with torch.no_grad():
        network.head.weight.zero_()
        network.stem[0].weight.zero_()
        network.stem[0].bias.fill_(-1)
        network.body[0].bias.fill_(-1)
    specs = [
        Spec(method, layers=["body"], target=None if method == "eigen-cam" else 0, normalisation=normalisation)
        for method in LAYERED
    ]

    assert [] == [flags for flags in flagged(network, tmp_path, *specs) if "empty" not in flags]


def test_a_map_of_one_cell_and_a_constant_one(tmp_path):
    """Both keep their value, also when they are normalised, and say that they show no place."""
    network = nn.Sequential()
    network.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    network.pool = nn.AdaptiveAvgPool2d(1)
    network.flat = nn.Flatten()
    network.head = nn.Linear(8, 4)
    with torch.no_grad():
        network.stem.weight.zero_()
        network.stem.bias.fill_(1)
        network.head.weight.fill_(0.5)
    row = np.ones((3, 32, 32), np.float32)
    specs = [Spec("grad-cam", layers=[layer], target=0, normalisation="min-max") for layer in ("stem", "pool")]

    result = explained(script_source("edge", network, tmp_path), *specs, row=row)

    assert [{"constant"}, {"constant"}] == [set(heatmap.flags) for heatmap in result.heatmaps]
    assert [1.0, 1.0] == [float(heatmap.values.min()) for heatmap in result.heatmaps]
    assert [(16, 16), (1, 1)] == [heatmap.values.shape for heatmap in result.heatmaps]


def test_a_map_of_nothing_but_counterevidence(tmp_path):
    """Rectified it is empty and says why; signed it is there."""
    network = TinyNet()
    with torch.no_grad():
        network.head.weight.copy_(-network.head.weight.abs())
    specs = [Spec("grad-cam", layers=["body"], target=0, rectify=rectify) for rectify in (True, False)]

    rectified, signed = flagged(network, tmp_path, *specs)

    assert {"empty", "negative-only"} == rectified
    assert {"negative-only"} == signed


class Cracked(TinyNet):
    """The first row of its features is not a number; its scores do not look there."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        features = self.body(self.broken(self.stem(x)))
        scores: Tensor = self.head(features[:, :, 4:].mean((2, 3)))
        return scores

    def broken(self, features: Tensor) -> Tensor:
        """The same with NaN in its first row."""
        return torch.cat([features[:, :, :1] / 0 * 0, features[:, :, 1:]], dim=2)


def test_cells_that_are_not_numbers(tmp_path):
    """They leave as zeros, flagged; the rest of the map is that of the cells."""
    specs = [Spec(method, layers=["body"], target=0) for method in ("hirescam", "layercam", "grad-cam", "score-cam")]

    assert [] == [flags for flags in flagged(Cracked(), tmp_path, *specs) if "non-finite" not in flags]


# 2. Calls and layers.


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_is_its_own_place(tmp_path, kind):
    """Each call of a shared ReLU and of a recurrent block has its own activation and gradient; the bare name is the last."""
    places = [("relu", 0), ("relu", 1), ("block", 0), ("block", 1), ("block", 2)]
    source = served_as(kind, shared, tmp_path, default_layer="relu")
    specs = [raw("hirescam", f"{layer}#{call}") for layer, call in places]

    maps = values_of(explained(source, *specs, raw("hirescam", "relu"), raw("hirescam", "block")))

    for got, (layer, call) in zip(maps, places, strict=False):
        activation, gradient = evidence(shared(), layer, torch.from_numpy(ROW), 1, call=call)
        assert_close(got, (activation * gradient).sum(0))
    np.testing.assert_array_equal(maps[1], maps[5])
    np.testing.assert_array_equal(maps[4], maps[6])


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_layers(tmp_path, kind):
    """Layers listed last to first, in one spec or in many, give what they give in order of the forward."""
    source = served_as(kind, shared, tmp_path, default_layer="relu")
    layers = ["stem", "relu#0", "block#1", "relu#1"]
    forwards = [raw("grad-cam", layer) for layer in layers]

    first = explained(source, *forwards, raw("layercam", *layers, fusion="max"))
    last = explained(source, *forwards[::-1], raw("layercam", *layers[::-1], fusion="max"))

    digests = [heatmap.raw_sha256 for heatmap in first.heatmaps]
    again = [heatmap.raw_sha256 for heatmap in last.heatmaps]
    assert digests[:-1] == again[:-1][::-1]
    assert digests[-1] == again[-1]


def test_a_call_that_is_not_made(tmp_path):
    """A call beyond the last is refused with the layers there are."""
    with (
        LocalExplainer(served_as("eager", shared, tmp_path, default_layer="relu"), settings()) as explainer,
        pytest.raises(NotFound, match="relu#2"),
    ):
        explainer.explain(TensorInput(ROW), [Spec("grad-cam", layers=["relu#2"])])


# 3. Targets.


def test_targets_of_neighbours_do_not_mix(serve, tmp_path):
    """Eight requests in one pass ask about classes of their own, 0 among them; each gets the map of its class alone."""
    source = script_source("tiny", TinyNet(), tmp_path)
    targets: list[int | str | None] = [0, 3, None, 1, 0, 2, 3, 0]
    server: BackgroundServer = serve(source, batch_window_seconds=0.3, torch_threads=1)

    async def run() -> list[Result]:
        async with AsyncClient(server.target) as client:
            calls = [
                client.explain(TensorInput(ROW), model="tiny", specs=[raw("grad-cam", "body", target=target)])
                for target in targets
            ]
            return await asyncio.gather(*calls)

    results = asyncio.run(run())

    for target, result in zip(targets, results, strict=True):
        asked = result.prediction.class_index if target is None else target
        activation, gradient = evidence(TinyNet().eval(), "body", torch.from_numpy(ROW), asked)
        assert asked == result.heatmaps[0].target.class_index
        assert_close(values_of(result)[0], (gradient.mean((1, 2), keepdim=True) * activation).sum(0), gate=1e-5)


@pytest.mark.parametrize(
    ("target", "kind", "reason"),
    [
        (-1, InvalidRequest, "CLASS_OUT_OF_RANGE"),
        (4, InvalidRequest, "CLASS_OUT_OF_RANGE"),
        ("zebra", NotFound, "LABEL_NOT_FOUND"),
    ],
)
def test_wrong_targets_are_errors(serve, tmp_path, target, kind, reason):
    """A class below zero, beyond the last or of no such name fails its own request, and nobody else's in the batch."""
    server: BackgroundServer = serve(script_source("tiny", TinyNet(), tmp_path), batch_window_seconds=0.3)

    async def run() -> list[Result | BaseException]:
        async with AsyncClient(server.target) as client:
            calls = [
                client.explain(TensorInput(ROW), model="tiny", specs=[Spec("grad-cam", target=asked)])
                for asked in (0, target, 3)
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

    good, wrong, last = asyncio.run(run())

    assert isinstance(wrong, kind)
    assert reason == wrong.reason
    assert [0, 3] == [result.heatmaps[0].target.class_index for result in (good, last)]


# 4. Scale.


def scaled(factor: float, bias: float = 0.0) -> nn.Module:
    """TinyNet with its head times a factor; class 0 is favoured by a bias."""
    network = TinyNet()
    with torch.no_grad():
        network.head.weight.mul_(factor)
        network.head.bias.mul_(factor)
        network.head.bias[0] += bias
    return network


def test_a_saturated_target(tmp_path):
    """At p = 1 the softmax's gradient is a billionth of the logit's or nothing: the map still reaches 1, or says it is empty."""
    specs = [
        Spec("grad-cam", layers=["body"], target=0, score=score, normalisation="min-max", encoding="float32")
        for score in ("logit", "softmax", "rest")
    ]
    for bias in (12.0, 25.0, 300.0):
        result = explained(script_source("edge", scaled(1.0, bias), tmp_path), *specs)

        assert np.isfinite(values_of(result)).all()
        for heatmap in result.heatmaps:
            assert 1.0 == float(heatmap.values.max()) or "empty" in heatmap.flags
        assert 1.0 == float(result.heatmaps[0].values.max())


@pytest.mark.parametrize("method", ["grad-cam", "xgrad-cam", "hirescam", "layercam", "ablation-cam", "cam"])
def test_scale_does_not_matter(tmp_path, method):
    """A head of a hundred-millionth of the size gives the same normalised map, with its peak at 1."""
    spec = Spec(method, layers=["body"], target=1, normalisation="min-max", encoding="float32")
    (expected,) = values_of(explained(script_source("one", scaled(1.0), tmp_path), spec))
    (got,) = values_of(explained(script_source("tiny", scaled(1e-8), tmp_path), spec))

    assert 1.0 == float(got.max())
    np.testing.assert_allclose(got, expected, atol=1e-3 if method == "ablation-cam" else 1e-5)

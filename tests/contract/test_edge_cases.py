"""The ten edge cases of CAM software, each held to a defined answer.

Where each one is shown:

 1. constant, 1 x 1, all-negative and NaN maps, no gradient: here, `test_a_map_of_nothing_is_flagged` and those after it;
    unit/cam/test_maps.py for every flag; test_refusals.py for gradients that end on the way.
 2. a module used twice, layers in any order: here, `test_every_call_is_its_own_place`, `test_the_order_of_layers`.
 3. mixed targets: here, `test_targets_of_neighbours_do_not_mix`, `test_wrong_targets_are_errors`; test_refusals.py.
 4. saturated softmax, tiny scales: here, `test_a_saturated_target`, `test_scale_does_not_matter`.
 5. in-place and functional ReLU, concatenation: here, `test_the_value_before_it_is_written_to`; test_refusals.py for gates.
 6. frozen, folded, quantised and traced models: here, `test_gradients_of_archives_are_exact` and those after it.
 7. transformers: here, `test_tokens_lie_on_their_grid`, `test_the_last_block_has_no_gradient_at_its_patches`;
    unit/engine/test_layout.py for windows and ambiguous shapes.
 8. geometry: here, `test_height_comes_before_width`; unit/test_geometry.py, unit/test_resize.py and e2e/test_options.py.
 9. the storm: e2e/test_storm.py and e2e/test_storm_amplified.py.
10. singular weights: here, `test_sums_that_vanish`, `test_half_precision_keeps_small_gradients`; unit/cam/test_weights.py
    for each formula, contract/test_identities.py for average pooling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.edges import centred, dense, evidence, functional_in_place, in_place, shared
from support.nets import TinyNet
from support.refusing import KINDS, served_as
from support.servers import script_source, settings
from torch import Tensor, nn

from camserve.client import AsyncClient, FailedPrecondition, InvalidRequest, NotFound, Result, Spec, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.local import LocalExplainer
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

ROW = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
INPUT = InputConfig(size=(32, 32))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks on several threads wait more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def explained(source: ModelSource, *specs: Spec | str, row: npt.NDArray[np.float32] = ROW, rows: int = 1) -> Result:
    """One input through all stages of a server, in this process."""
    with LocalExplainer(source, settings()) as explainer:
        return explainer.explain(TensorInput(row), specs, batch_rows=rows)


def raw(method: str, *layers: str, target: int | None = 1, **options: object) -> Spec:
    """A spec whose map arrives as it was computed: exact and signed."""
    return Spec(method, layers=layers, target=target, encoding="float32", rectify=False, **options)


def values_of(result: Result) -> list[npt.NDArray[np.float32]]:
    """The maps; nothing may have failed."""
    assert [] == [str(error.error) for error in result.errors]
    return [heatmap.values for heatmap in result.heatmaps]


def assert_close(got: npt.NDArray[np.float32], expected: Tensor, gate: float = 2e-6) -> None:
    """Within so much of the largest value."""
    np.testing.assert_allclose(got, expected.numpy(), atol=gate * float(expected.abs().max()))


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


# 5. Values that are overwritten.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factory", [in_place, functional_in_place, dense])
def test_the_value_before_it_is_written_to(tmp_path, kind, factory):
    """A convolution whose output is rectified or added to in place is tapped as it came, in every kind of program."""
    source = served_as(kind, factory, tmp_path, default_layer="body")
    (got,) = values_of(explained(source, raw("hirescam", "body")))
    activation, gradient = evidence(factory(), "body", torch.from_numpy(ROW), 1)

    assert float(activation.min()) < 0
    assert_close(got, (activation * gradient).sum(0))


# 6. Models as people save them.


class Normed(nn.Module):
    """Convolution, batch normalisation, ReLU, and a layer that bends: gradients differ from cell to cell."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.last = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 4)
            with torch.no_grad():
                self.body[1].running_mean.uniform_(-0.2, 0.2)
                self.body[1].running_var.uniform_(0.5, 2)
                self.body[1].weight.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        scores: Tensor = self.head(torch.tanh(self.last(self.body(x))).mean((2, 3)))
        return scores


def normed() -> nn.Module:
    """The factory of `Normed`."""
    return Normed().eval()


def normed_in_inference_mode() -> nn.Module:
    """The same, made where nothing may be differentiated."""
    with torch.inference_mode():
        return Normed().eval()


def folded() -> nn.Module:
    """The same with its normalisation folded into the convolution."""
    network = normed()
    assert isinstance(network, Normed)
    network.body[0] = torch.nn.utils.fusion.fuse_conv_bn_eval(network.body[0], network.body[1])
    network.body[1] = nn.Identity()
    return network


EXAMPLE = torch.zeros(2, 3, 32, 32)
ARCHIVES: dict[str, tuple[Callable[[], torch.jit.ScriptModule], str, str]] = {
    "scripted": (lambda: torch.jit.script(normed()), "body", "last"),
    "parameters frozen": (lambda: torch.jit.script(normed().requires_grad_(requires_grad=False)), "body", "last"),
    "traced": (lambda: torch.jit.trace(normed(), EXAMPLE), "body", "last"),
    "folded": (lambda: torch.jit.script(folded()), "body", "last"),
    "frozen": (lambda: torch.jit.freeze(torch.jit.script(normed())), "op.relu", "op.conv2d#1"),
    "traced and frozen": (lambda: torch.jit.freeze(torch.jit.trace(normed(), EXAMPLE)), "op.relu", "op.convolution#1"),
}


@pytest.mark.parametrize("way", ARCHIVES)
def test_gradients_of_archives_are_exact(tmp_path, way):
    """Frozen parameters, folded normalisation, traces: activation times gradient is that of the eager model at both layers."""
    make, *layers = ARCHIVES[way]
    path = tmp_path / "edge.pt"
    torch.jit.save(make(), str(path))
    source = ModelSource(name="edge", version="1", path=path, config=ModelConfig(input=INPUT))

    maps = values_of(explained(source, *[raw("hirescam", layer) for layer in layers]))

    for got, layer in zip(maps, ("body", "last"), strict=True):
        activation, gradient = evidence(normed(), layer, torch.from_numpy(ROW), 1)
        assert_close(got, (activation * gradient).sum(0), gate=1e-5 if "fr" in way or way == "folded" else 2e-6)


def test_a_model_made_under_inference_mode(tmp_path):
    """Its tensors may not be differentiated through as they are; served, the gradient is exact all the same."""
    source = served_as("eager", normed_in_inference_mode, tmp_path, default_layer="body")
    (got,) = values_of(explained(source, raw("hirescam", "body")))
    activation, gradient = evidence(normed(), "body", torch.from_numpy(ROW), 1)

    assert_close(got, (activation * gradient).sum(0))


@pytest.mark.filterwarnings("ignore")  # PyTorch calls all of it deprecated, and warns of what is shown here.
def test_a_quantised_head(tmp_path):
    """Whole numbers have no derivative: Grad-CAM is refused with what works, and that works."""
    network = torch.ao.quantization.quantize_dynamic(normed(), {nn.Linear}, dtype=torch.qint8)
    path = tmp_path / "edge.pt"
    torch.jit.save(torch.jit.script(network), str(path))
    source = ModelSource(name="edge", version="1", path=path, config=ModelConfig(input=INPUT))
    works = [Spec("eigen-cam", layers=["body"]), Spec("ablation-cam", layers=["body"], target=1)]

    with LocalExplainer(source, settings()) as explainer:
        result = explainer.explain(TensorInput(ROW), [Spec("grad-cam", layers=["body"]), *works])

    assert [1, 2] == [heatmap.spec_index for heatmap in result.heatmaps]
    assert isinstance(result.errors[0].error, FailedPrecondition)
    assert [] == [
        word for word in ("grad-cam", "'body'", "whole numbers", "score-cam") if word not in str(result.errors[0].error)
    ]


# 7. Tokens.


class Transformer(nn.Module):
    """Patches on a grid of 4 x 2 and some tokens before them; the first token, or their mean, is classified."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Conv2d(3, 8, 8, stride=8)
        self.extra = nn.Parameter(torch.randn(1, prefix, 8))
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in "ab"])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 32 16) to (b 4)."""
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(x), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        scores: Tensor = self.head(tokens[:, 0])
        return scores


class ChannelsLast(nn.Module):
    """Blocks of (b h w c), as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, stride=8)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 32 16) to (b 4)."""
        cells = self.embed(x).permute(0, 2, 3, 1)
        scores: Tensor = self.head((self.block(cells) ** 2).mean((1, 2)))
        return scores


def _of(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return build().eval()


def one_token() -> nn.Module:
    """A class token."""
    return _of(lambda: Transformer(1))


def two_tokens() -> nn.Module:
    """A class and a distillation token."""
    return _of(lambda: Transformer(2))


def five_tokens() -> nn.Module:
    """A class token and four registers."""
    return _of(lambda: Transformer(5))


def channels_last() -> nn.Module:
    """No tokens."""
    return _of(ChannelsLast)


TALL = np.random.default_rng(5).standard_normal((3, 32, 16)).astype(np.float32)


@pytest.mark.parametrize(("factory", "prefix"), [(one_token, 1), (two_tokens, 2), (five_tokens, 5)])
def test_tokens_lie_on_their_grid(tmp_path, factory, prefix):
    """However many tokens stand before the patches, the map is 4 high and 2 wide, and each cell that of its patch."""
    source = served_as("eager", factory, tmp_path, input=InputConfig(size=(32, 16)))
    (got,) = values_of(explained(source, raw("hirescam", "blocks.0"), row=TALL))
    activation, gradient = evidence(factory(), "blocks.0", torch.from_numpy(TALL), 1)

    assert_close(got, (activation * gradient)[prefix:].sum(1).reshape(4, 2), gate=1e-5)


def test_channels_may_come_last(tmp_path):
    """(b h w c) is read as such, on a grid that is not square."""
    source = served_as("eager", channels_last, tmp_path, input=InputConfig(size=(32, 16)))
    (got,) = values_of(explained(source, raw("hirescam", "block"), row=TALL))
    activation, gradient = evidence(channels_last(), "block", torch.from_numpy(TALL), 1)

    assert_close(got, (activation * gradient).sum(2), gate=1e-5)


def test_the_last_block_has_no_gradient_at_its_patches(tmp_path):
    """Only its class token is classified: it is not the default, a gradient is refused there, an activation is not."""
    source = served_as("eager", one_token, tmp_path, input=InputConfig(size=(32, 16)))
    with LocalExplainer(source, settings()) as explainer:
        by_default = explainer.explain(TensorInput(TALL), ["grad-cam"]).heatmaps[0]
        eigen = explainer.explain(TensorInput(TALL), [Spec("eigen-cam", layers=["blocks.1"])]).heatmaps[0]
        with pytest.raises(FailedPrecondition, match=r"grad-cam gives no map at layer 'blocks\.1'") as caught:
            explainer.explain(TensorInput(TALL), [Spec("grad-cam", layers=["blocks.1"])])

    assert "blocks.1" not in by_default.layers
    assert "empty" not in eigen.flags
    assert "(eager)" in str(caught.value)


# 8. Height and width.


@pytest.mark.parametrize("kind", KINDS)
def test_height_comes_before_width(tmp_path, kind):
    """The only bright cells of a wide picture are low and on the right: so is the map's peak, at the layer and on the input."""
    row = np.zeros((3, 32, 32), np.float32)
    row[:, 20:28, 4:8] = 3
    source = served_as(kind, in_place, tmp_path, default_layer="body")
    specs = [Spec("eigen-cam", layers=["body"], encoding="float32", size=size) for size in ("layer", "input")]
    layer, large = values_of(explained(source, *specs, row=np.abs(row)))

    assert (16, 16) == layer.shape
    assert (32, 32) == large.shape
    top, left = np.unravel_index(np.argmax(np.abs(large - np.median(large))), large.shape)
    assert 18 <= top < 30
    assert 2 <= left < 10


# 10. Weights that are quotients.


def test_sums_that_vanish(tmp_path):
    """Channels that sum to zero, or below it: XGrad-CAM and Grad-CAM++ are finite, and no cell outweighs what it holds."""
    source = served_as("scripted", centred, tmp_path, default_layer="zero")
    for layer in ("zero", "below"):
        methods = ("xgrad-cam", "grad-cam++", "refine-cam", "grad-cam")
        result = explained(source, *[raw(method, layer) for method in methods])
        activation, gradient = evidence(centred(), layer, torch.from_numpy(ROW), 1)
        assert float(activation.sum((1, 2)).max()) < 1e-3

        assert np.isfinite(values_of(result)).all()
        assert [] == [heatmap.method for heatmap in result.heatmaps if "non-finite" in heatmap.flags]
        xgrad = values_of(result)[0]
        # A weighted mean whose weights sum to nothing would have no bound.
        if layer == "zero":
            bound = float((gradient.abs().mean((1, 2)) * activation.abs().amax((1, 2))).sum())
            assert np.abs(xgrad).max() <= bound


def test_half_precision_keeps_small_gradients(tmp_path):
    """Where the cube of a gradient vanishes in half precision, Grad-CAM++ is that of float32."""
    small = scaled(1e-2)
    spec = Spec("grad-cam++", layers=["body"], target=1, normalisation="min-max", encoding="float32")
    (single,) = values_of(explained(script_source("single", small, tmp_path), spec))
    (half,) = values_of(explained(script_source("half", small, tmp_path, precision="float16"), spec))

    assert 1.0 == float(half.max())
    assert float(np.corrcoef(single.ravel(), half.ravel())[0, 1]) > 0.999

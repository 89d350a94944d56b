"""The second half of the ten edge cases, those of how models are built and saved; `test_edge_cases.py` lists all ten."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.edges import (
    INPUT,
    ROW,
    assert_close,
    centred,
    dense,
    evidence,
    explained,
    functional_in_place,
    in_place,
    raw,
    values_of,
)
from support.nets import TinyNet
from support.refusing import KINDS, served_as
from support.servers import script_source, settings
from torch import Tensor, nn

from camserve.client import FailedPrecondition, Spec, TensorInput
from camserve.server.local import LocalExplainer
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks on several threads wait more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    """The only bright cells are low and on the left: so is the map's peak, at the layer and on the input."""
    row = np.zeros((3, 32, 32), np.float32)
    row[:, 20:28, 4:8] = 3
    source = served_as(kind, in_place, tmp_path, default_layer="body")
    specs = [Spec("eigen-cam", layers=["body"], encoding="float32", size=size) for size in ("layer", "input")]
    layer, large = values_of(explained(source, *specs, row=row))

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
    small = TinyNet()
    with torch.no_grad():
        small.head.weight.mul_(1e-2)
    spec = Spec("grad-cam++", layers=["body"], target=1, normalisation="min-max", encoding="float32")
    (single,) = values_of(explained(script_source("single", small, tmp_path), spec))
    (half,) = values_of(explained(script_source("half", small, tmp_path, precision="float16"), spec))

    assert 1.0 == float(half.max())
    assert float(np.corrcoef(single.ravel(), half.ravel())[0, 1]) > 0.999

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import load_export
from camserve.server.engine.layout import LayoutKind
from camserve.server.engine.probe import LayerReport, ProbeReport, find_linear_head, probe
from camserve.server.engine.program import Program
from camserve.server.engine.script import load_script
from camserve.server.errors import ExecutionFailed
from camserve.server.jobs import OutputKind

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small convolutions on two threads of a busy machine wait more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Two convolutions, a middle and a linear head behind average pooling."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.middle = middle or nn.Identity()
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        return self.head(self.block(self.middle(self.stem(images))).mean((2, 3)))


class TrainedNorm(nn.Module):
    """A batch norm that always uses the batch's own statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return nn.functional.batch_norm(x, None, None, training=True)


class BatchSoftmax(nn.Module):
    """Rows compete."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x * x.mean((1, 2, 3), keepdim=True).softmax(0)


class Noise(nn.Module):
    """Other outputs each time."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x + torch.rand_like(x)


class Block(nn.Module):
    """A transformer block with plain attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width), same shape."""
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Classifies by its first token; `prefix` tokens stand before the patches."""

    def __init__(self, prefix: int, size: tuple[int, int], width: int = 22) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        cells = (size[0] // 8) * (size[1] // 8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.places = nn.Parameter(torch.randn(1, prefix + cells, width))
        self.blocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.head = nn.Linear(width, 7)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 7)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix.expand(images.shape[0], -1, -1), patches], 1) + self.places
        return self.head(self.blocks(tokens)[:, 0])


class NonSquare(nn.Module):
    """Channels last, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 3)."""
        return self.head(self.norm(self.stem(images).permute(0, 2, 3, 1)).mean((1, 2)))


def eager(module: nn.Module, shape: tuple[int, ...] = (1, 3, 32, 32), **options: Any) -> ProbeReport:
    """The report on an eager module."""
    return probe(EagerProgram(module, device=CPU), torch.randn(shape), **options)


def layer(report: ProbeReport, name: str) -> LayerReport:
    """One layer's entry."""
    return next(layer for layer in report.layers if name in layer.spellings)


def exported(module: nn.Module, inputs: Tensor, *, is_dynamic: bool = False) -> Program:
    """An export with a batch of its own, or any."""
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},) if is_dynamic else None
    stream = io.BytesIO()
    torch.export.save(torch.export.export(module.eval(), (inputs,), dynamic_shapes=batch), stream)
    stream.seek(0)
    return load_export(stream, device=CPU)


def traced(module: nn.Module, inputs: Tensor) -> Program:
    """A trace, saved and loaded."""
    stream = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(module.eval(), inputs), stream)
    stream.seek(0)
    return load_script(stream, device=CPU)


def scripted(module: nn.Module, _inputs: Tensor) -> Program:
    """A script, saved and loaded."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(module.eval()), stream)
    stream.seek(0)
    return load_script(stream, device=CPU)


KINDS: dict[str, Callable[[nn.Module, Tensor], Program]] = {
    "scripted": scripted,
    "traced": traced,
    "exported": lambda module, inputs: exported(module, inputs, is_dynamic=True),
    "eager": lambda module, _inputs: EagerProgram(module, device=CPU),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_program_is_read_alike(kind: str) -> None:
    """Layers, default layer and head come out the same through the protocol."""
    module = Net(nn.BatchNorm2d(4))

    report = probe(KINDS[kind](module, torch.randn(2, 3, 32, 32)), torch.randn(1, 3, 32, 32))

    assert ["stem", "middle", "block.0", "block.1", "block", "head"] == [layer.name for layer in report.layers]
    assert "block" == report.default_layer == report.head_layer
    assert (LayoutKind.CHANNELS_FIRST, (16, 16), 6) == (
        report.layouts["block"].kind,
        report.layouts["block"].grid,
        report.layouts["block#0"].channels,
    )
    assert (1, 2, 3) == report.batch_sizes
    assert (None, None, True, True) == (
        report.static_batch,
        report.max_batch,
        report.rows_independent,
        report.differentiable,
    )
    assert report.head is not None
    assert torch.equal(module.head.weight, report.head.weight)
    assert report.head.bias is not None
    assert torch.equal(module.head.bias, report.head.bias)
    assert 5 == report.classes
    assert () == report.notes


def test_a_layer_without_space_is_listed_with_the_reason() -> None:
    """A vector is no map, and says so."""
    head = layer(eager(Net()), "head")

    assert (5,) == head.shape
    assert head.layout is None
    assert "no axes" in head.refusal


def test_each_call_of_a_layer_is_listed_and_the_last_has_the_bare_name() -> None:
    """Layouts can be looked up under every spelling."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.relu(x) - 0.1)

    report = eager(Net(Twice()))

    assert ["middle.relu#0", "middle.relu#1"] == [one.name for one in report.layers if "relu" in one.name]
    assert layer(report, "middle.relu").name == "middle.relu#1"
    assert {"middle.relu", "middle.relu#0", "middle.relu#1"} == {name for name in report.layouts if "relu" in name}


@pytest.mark.parametrize("middle", [TrainedNorm, BatchSoftmax])
def test_rows_that_influence_each_other_are_found(middle: type[nn.Module]) -> None:
    """Such a model runs one row at a time, else a map would depend on who else asked."""
    report = eager(Net(middle()))

    assert (False, 1) == (report.rows_independent, report.max_batch)
    assert "neighbours" in report.notes[0]


def test_a_model_that_draws_random_numbers_is_found() -> None:
    """It is told apart from one whose rows influence each other."""
    report = eager(Net(Noise()))

    assert 1 == report.max_batch
    assert "same input" in report.notes[0]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_static_batch_is_found(rows: int) -> None:
    """Also when none of the sizes asked for is it."""
    program = exported(Net(), torch.randn(rows, 3, 32, 32))

    report = probe(program, torch.randn(1, 3, 32, 32))

    assert (rows, rows, (rows,)) == (report.static_batch, report.max_batch, report.batch_sizes)
    assert "block" == report.default_layer


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_that_bakes_in_its_batch_is_found() -> None:
    """It may run on others and return another number of rows."""

    class Baked(Net):
        def forward(self, images: Tensor) -> Tensor:
            rows = int(images.shape[0])
            return super().forward(images)[:rows]

    report = probe(traced(Baked(), torch.randn(2, 3, 32, 32)), torch.randn(1, 3, 32, 32))

    assert (1, 2) == report.batch_sizes
    assert report.static_batch is None


def test_an_input_of_another_shape_fails_with_what_was_tried() -> None:
    """The loader shows this to whoever wrote the card."""
    with pytest.raises(ExecutionFailed, match=r"input of shape \(4, 32, 32\) at any batch size; 1 rows: "):
        eager(Net(), (1, 4, 32, 32))


@pytest.mark.parametrize(("prefix", "size"), [(1, (32, 32)), (2, (24, 40)), (5, (40, 24))])
def test_a_transformer_is_read_as_tokens(prefix: int, size: tuple[int, int]) -> None:
    """Prefix tokens are told from the grid, square or not, and the default is the last block whose patches matter."""
    report = eager(Transformer(prefix, size), (1, 3, *size))

    layout = report.layouts["blocks.0"]
    assert (LayoutKind.TOKENS, (size[0] // 8, size[1] // 8), prefix) == (layout.kind, layout.grid, layout.prefix)
    assert "blocks.1" == report.default_layer
    assert layer(report, "blocks.1").has_gradient
    assert layer(report, "blocks.2").has_gradient is False


def test_a_transformer_traced_through_fused_attention_has_no_derivative() -> None:
    """The report says how to trace it again; layers are listed all the same."""
    report = probe(traced(Transformer(1, (32, 32)), torch.randn(1, 3, 32, 32)), torch.randn(1, 3, 32, 32))

    assert not report.differentiable
    assert "set_fastpath_enabled(False)" in report.differentiable_reason
    assert LayoutKind.TOKENS == report.layouts["blocks.1"].kind
    assert report.default_layer


def test_channels_last_blocks_are_read() -> None:
    """(b, h, w, c) is found by what another input size changes."""
    report = eager(NonSquare(), (1, 3, 32, 64))

    assert (LayoutKind.CHANNELS_LAST, (8, 16), 8) == (
        report.layouts["norm"].kind,
        report.layouts["norm"].grid,
        report.layouts["norm"].channels,
    )
    assert "norm" == report.default_layer == report.head_layer


@pytest.mark.parametrize(
    ("convolution", "shape", "grid"),
    [
        pytest.param(nn.Conv1d, (1, 2, 64), (64,), id="signal"),
        pytest.param(nn.Conv3d, (1, 2, 16, 32, 32), (16, 32, 32), id="volume"),
    ],
)
def test_signals_and_volumes_are_maps_too(
    convolution: type[nn.Conv1d] | type[nn.Conv3d], shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    """Also before a head of fixed size, where the whole model takes no other input."""
    module = nn.Sequential(
        convolution(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * torch.Size(grid).numel(), 3)
    )

    report = eager(module, shape)

    assert (LayoutKind.CHANNELS_FIRST, grid, 4) == (
        report.layouts["1"].kind,
        report.layouts["1"].grid,
        report.layouts["1"].channels,
    )
    assert "1" == report.default_layer


def test_a_model_without_gradients_says_why() -> None:
    """Maps that need none can still be made."""

    class Blocked(Net):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(images)

    report = eager(Blocked())

    assert not report.differentiable
    assert "without gradients" in report.differentiable_reason
    assert "block" == report.default_layer


def test_the_layer_of_a_dense_output_is_not_the_default() -> None:
    """A segmentation's class maps explain themselves; the layer before them is chosen."""
    report = eager(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1)))

    assert "1" == report.default_layer
    assert 0 == report.classes


def test_an_untrained_head_of_zeros_is_noted() -> None:
    """No layer has a gradient then, and every matrix of zeros would pass for the head."""
    module = Net()
    nn.init.zeros_(module.head.weight)

    report = eager(module)

    assert report.head is None
    assert "block" == report.default_layer
    assert "untrained" in report.notes[0]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_convolution", [True, False])
def test_the_head_is_found_by_its_numbers(has_bias: bool, is_convolution: bool) -> None:  # noqa: FBT001
    """Linear or 1x1 convolution, with and without bias, among other matrices of the same shape."""
    weight, bias = torch.randn(5, 6), torch.randn(5)
    tensors = {
        "other": torch.randn(5, 6),
        "weight": weight[:, :, None, None] if is_convolution else weight,
        "bias": bias,
        "unlike": torch.randn(5),
    }
    activation = torch.randn(2, 6, 3, 4)
    logits = activation.mean((2, 3)) @ weight.T + (bias if has_bias else 0)

    head = find_linear_head(tensors, activation, logits)

    assert head is not None
    assert torch.equal(weight, head.weight)
    assert has_bias == (head.bias is not None)


def test_no_head_is_found_behind_anything_else() -> None:
    """A maximum instead of the average, for one."""
    weight = torch.randn(5, 6)
    activation = torch.randn(2, 6, 3, 4)

    assert find_linear_head({"weight": weight}, activation, activation.amax((2, 3)) @ weight.T) is None


@pytest.mark.parametrize(
    ("name", "default", "head_layer"),
    [("resnet18", "layer4", "layer4"), ("mobilenet_v3_small", "features.12", ""), ("vgg11", "features.20", "")],
)
def test_the_default_is_the_last_stage(name: str, default: str, head_layer: str) -> None:
    """The name that people expect, of several that hold the same value."""
    report = eager(torchvision.models.get_model(name, weights=None), (1, 3, 224, 224))

    assert (default, head_layer) == (report.default_layer, report.head_layer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "default", "head_layer"),
    [
        ("efficientnet_b0", "features.8", "features.8"),
        ("densenet121", "features.norm5", ""),
        ("convnext_tiny", "features.7", ""),
        ("swin_t", "permute", "permute"),
        ("resnet50", "layer4", "layer4"),
    ],
)
def test_the_default_of_larger_networks(name: str, default: str, head_layer: str) -> None:
    """As above."""
    report = eager(torchvision.models.get_model(name, weights=None), (1, 3, 224, 224))

    assert (default, head_layer) == (report.default_layer, report.head_layer)


class UNet(nn.Module):
    """Down to a quarter and up again; returns as torchvision's segmentation networks do."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.join = nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Conv2d(6, classes, 1)
        self.aux = nn.Conv2d(8, classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(b, 3, h, w) to scores (b, classes, h / 2, w / 2) and their coarse twin."""
        fine = self.down(images).relu()
        coarse = self.deep(fine).relu()
        joined = self.join(torch.cat([fine, self.up(coarse)], 1)).relu()
        return {"out": self.out(joined), "aux": self.aux(coarse)}


def test_a_segmentation_is_looked_at_by_its_path() -> None:
    """Its own layer is not the default, nor is one that only the other output depends on; classes are its channels."""
    report = eager(UNet(), output_path="out", output_kind=OutputKind.SEGMENTATION)

    assert (3, "join", ("deep", "join")) == (report.classes, report.default_layer, report.stages)
    assert layer(report, "aux").has_gradient is False
    assert report.differentiable
    assert (1, 2, 3) == report.batch_sizes


def test_what_is_not_of_the_named_kind_is_refused() -> None:
    """Only a card that names no kind is helped out."""
    with pytest.raises(ExecutionFailed, match=r"several tensors.*paths: out, aux"):
        eager(UNet(), output_kind=OutputKind.SEGMENTATION)
    with pytest.raises(ExecutionFailed, match=r"floating \(b, classes, \*cells\)"):
        eager(Net(), output_kind=OutputKind.SEGMENTATION)


def test_a_sequence_has_the_classes_of_a_step() -> None:
    """(b, steps, classes)."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.head = nn.Linear(6, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.body(images).relu().mean(2).movedim(1, 2))

    report = eager(Reader(), (1, 3, 32, 64), output_kind=OutputKind.SEQUENCE)

    assert (5, "body", ("body",)) == (report.classes, report.default_layer, report.stages)


@pytest.mark.parametrize("kind", [OutputKind.EMBEDDING, OutputKind.MULTI_LABEL, OutputKind.REGRESSION])
def test_vectors_of_every_kind_are_looked_at_alike(kind: OutputKind) -> None:
    """A linear head is found behind any of them."""
    report = eager(Net(), output_kind=kind)

    assert (5, "block", "block") == (report.classes, report.default_layer, report.head_layer)


def test_one_value_a_row_is_a_regression() -> None:
    """(b) counts as one channel."""
    module = nn.Sequential(Net(), nn.Linear(5, 1), nn.Flatten(0))

    assert 1 == eager(module, output_kind=OutputKind.REGRESSION).classes


def detector(**options: Any) -> nn.Module:
    """A Faster R-CNN with random weights."""
    builder: Any = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    counts = {"rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
    module: nn.Module = builder(
        weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=96, **counts, **options
    )
    return module


def test_a_detector_is_looked_at_through_its_scores() -> None:
    """They depend on the backbone; how many classes there are does not show."""
    report = eager(detector(box_score_thresh=0.0), (1, 3, 96, 96), output_kind=OutputKind.DETECTION)

    assert (1, 2, 3) == report.batch_sizes
    assert 0 == report.classes
    assert report.differentiable
    assert layer(report, "backbone.body.16").has_gradient
    assert layer(report, report.default_layer).has_gradient
    assert report.head is None
    assert report.stages


def test_a_detector_that_finds_nothing_in_noise_is_noted() -> None:
    """Its layers can be mapped all the same: with an image it may find something."""
    report = eager(detector(box_score_thresh=0.99), (1, 3, 96, 96), output_kind=OutputKind.DETECTION)

    assert "found nothing in noise" in report.notes[-1]
    assert report.differentiable
    assert layer(report, "backbone.body.16").has_gradient is None
    assert report.default_layer


def test_further_inputs_are_passed_on() -> None:
    """Noise for numbers, the same for whole ones; a neighbour's do not matter."""

    class Asked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 5)

        def forward(self, images: Tensor, words: Tensor, scale: Tensor) -> Tensor:
            return super().forward(images) * scale[:, None] + self.words(words).sum(1)

    report = eager(Asked(), extras=(torch.tensor([[1, 9, 3]]), torch.ones(1)))

    assert ((1, 2, 3), True, "block") == (report.batch_sizes, report.rows_independent, report.default_layer)
    assert (16, 16) == report.layouts["block"].grid


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ("relu", "layer1", "layer2", "layer3", "layer4")),
        ("resnet50", ("relu", "layer1", "layer2", "layer3", "layer4")),
        ("mobilenet_v3_small", ("features.0.2", "features.1", "features.3", "features.8", "features.12")),
    ],
)
def test_stages_are_the_last_blocks_of_each_resolution(name: str, stages: tuple[str, ...]) -> None:
    """Shallowest first, and the default among them; cells that were averaged away are none."""
    report = eager(torchvision.models.get_model(name, weights=None), (1, 3, 64, 64))

    assert stages == report.stages
    assert report.default_layer in stages


def test_a_transformers_blocks_are_one_stage() -> None:
    """All have the grid of the patches."""
    report = eager(Transformer(1, (32, 32)))

    assert (report.default_layer,) == report.stages

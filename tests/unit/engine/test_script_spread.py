"""Spreading what crosses a cut over copies of one row: the tail on ablated activations is the whole model with a hook."""
# The models are data: their class docstring, or the test, tells what they are.
# ruff: noqa: D102

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from camserve.server.engine.program import TapName
from camserve.server.engine.script import ScriptProgram, load_script
from camserve.server.engine.script_spread import Along, Ambiguous, grown, growth_of
from camserve.server.errors import Reason, Unsupported

HOWS = ["script", "trace"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small convolutions on two threads of a busy machine wait more than they compute."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def program_of(model: nn.Module, how: str, *inputs: Tensor) -> ScriptProgram:
    """The model scripted or traced, saved and loaded."""
    model = model.eval().requires_grad_(requires_grad=False)
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(model) if how == "script" else torch.jit.trace(model, inputs), stream)
    stream.seek(0)
    return load_script(stream, device=torch.device("cpu"))


def ablated(value: Tensor) -> Tensor:
    """Without channel k in row k."""
    value = value.clone()
    for row in range(len(value)):
        value[row, row] = 0
    return value


def hooked(model: nn.Module, layer: str, batch: Tensor) -> Tensor:
    """The eager model's outputs with the same ablation in a hook."""
    with model.get_submodule(layer).register_forward_hook(lambda _module, _args, output: ablated(output)):
        outputs: Tensor = model(batch)
    return outputs


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((expected - got).abs().max() / expected.abs().max())


class Flat(nn.Module):
    """A skip over a view that takes its size from the batch, so that a tensor and an integer cross."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        size = x.size(0)
        skip = self.stem(x)
        body = self.body(skip.relu())
        return self.head(body.view(size, -1) + skip.view(size, -1) * 0.5)


class Windows(nn.Module):
    """Four windows a row are folded into the batch, one row after the other or alternating; both cross."""

    def __init__(self, *, is_interleaved: bool) -> None:
        super().__init__()
        self.is_interleaved = is_interleaved
        self.stem = nn.Conv2d(3, 6, 1)
        self.body = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        windows = torch.stack(
            [x[..., :4, :4], x[..., 4:, :4], x[..., :4, 4:], x[..., 4:, 4:]], 0 if self.is_interleaved else 1
        )
        windows = windows.flatten(0, 1)
        y = self.body(x).mean((2, 3))
        windows = windows.mean((2, 3))
        windows = windows.view(4, -1, 6).mean(0) if self.is_interleaved else windows.view(-1, 4, 6).mean(1)
        return self.head(y.relu() + windows)


class Overwritten(nn.Module):
    """The tail adds to what crosses in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.body = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        y = self.body(skip)
        skip += y
        return skip.relu_().mean((2, 3)) + y.mean((2, 3))


def resnet() -> nn.Module:
    """In-place sums."""
    return torchvision.models.resnet18(num_classes=5)


def densenet() -> nn.Module:
    """Concatenations of lists."""
    return torchvision.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8, num_classes=5)


CASES: list[tuple[Callable[[], nn.Module], str, int, bool]] = [
    (resnet, "layer2.0.conv2", 32, True),
    (resnet, "layer2.1.bn1", 32, True),
    (resnet, "layer4", 32, False),
    (densenet, "features.denseblock1.denselayer2.conv1", 32, True),
    (densenet, "features.norm5", 32, False),
    (Flat, "body", 8, True),
    (Overwritten, "body", 8, True),
    (lambda: Windows(is_interleaved=False), "stem", 8, False),
    (lambda: Windows(is_interleaved=False), "body", 8, True),
    (lambda: Windows(is_interleaved=True), "body", 8, True),
]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("build", "layer", "side", "crosses"), CASES)
def test_the_tail_on_a_spread_crossing_is_the_whole_model_with_a_hook(
    build: Callable[[], nn.Module],
    layer: str,
    side: int,
    crosses: bool,  # noqa: FBT001 - a case
    how: str,
) -> None:
    """For other numbers of rows than were looked at, and twice, with the values of the latest row."""
    model, example = build().eval(), torch.randn(1, 3, side, side)
    program = program_of(model, how, torch.randn(2, 3, side, side))
    cut = program.cut(TapName.parse(layer))
    _, first = cut.front(example)
    cut.spread(first, 2)
    for rows in (5, 1):
        x = torch.randn(1, 3, side, side)
        activation, crossing = cut.front(x)
        batch = ablated(activation.expand(rows, *activation.shape[1:]))
        spread = cut.spread(crossing, rows)
        expected = hooked(model, layer, x.expand(rows, -1, -1, -1).contiguous())

        assert crosses == bool(crossing.values)
        assert relative_difference(expected, cut.tail(batch, spread)) <= 1e-6
        assert relative_difference(expected, cut.tail(batch, spread)) <= 1e-6
        assert torch.equal(program.run(x), cut.tail(activation, crossing))


def test_the_front_runs_once_more_for_a_shape_and_never_where_nothing_crosses() -> None:
    """After the first row of a shape a spread costs nothing; rows share their memory."""
    program = program_of(resnet(), "script")
    cut, last = program.cut(TapName("layer2.1.conv1")), program.cut(TapName("layer4"))
    runs, front = [], cut._front
    cut._front = lambda *arguments: runs.append(1) or front(*arguments)
    crossings = [cut.front(torch.randn(1, 3, side, side))[1] for side in (32, 32, 48)]
    spread = [cut.spread(crossing, 7) for crossing in crossings]
    cut.spread(crossings[0], 3)
    _, free = last.front(torch.randn(1, 3, 32, 32))

    assert 3 + 2 == len(runs)
    assert crossings[0].values[0].data_ptr() == spread[0].values[0].data_ptr()
    assert (7, 128, 4, 4) == tuple(spread[0].values[0].shape)
    assert free is last.spread(free, 1000)


def test_values_that_are_never_read_do_not_cross() -> None:
    """Early returns leave such values in a frozen transformer; it is cut in every layer all the same."""
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    stream = io.BytesIO()
    torch.jit.save(torch.jit.freeze(torch.jit.script(model.eval())), stream)
    stream.seek(0)
    program, x = load_script(stream, device=torch.device("cpu")), torch.randn(1, 3, 16, 16)
    for tap in ("op.conv2d", "op.layer_norm#0", "op.layer_norm#1", "op.gelu#0", "op.add#2"):
        cut = program.cut(TapName.parse(tap))
        activation, crossing = cut.front(x)
        rows = cut.tail(activation.expand(3, *activation.shape[1:]), cut.spread(crossing, 3))

        assert torch.equal(program.run(x), cut.tail(activation, crossing))
        assert torch.allclose(program.run(x).expand(3, -1), rows, rtol=1e-5, atol=1e-6)


class BatchStatistics(nn.Module):
    """What crosses is a sum over the batch, or a list that is as long as the batch."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.stem = nn.Conv2d(3, 6, 1)
        self.body = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rows = list(x.unbind(0))
        total = x.sum(0) + 1.0
        count = x.size(0) + 3
        gram = x.flatten(1) @ x.flatten(1).t()
        y = self.body(x)
        if self.what == "list":
            return y + torch.stack(rows)
        if self.what == "sum":
            return y + total
        if self.what == "gram":
            return y.mean((2, 3)) + gram.sum()
        return y * float(count)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("list", "a list of 1"),
        ("sum", r"shape \(6, 4, 4\)"),
        ("gram", r"shape \(1, 1\)"),
        ("count", "4 for one row and 5"),
    ],
)
def test_what_cannot_be_told_is_refused(what: str, named: str) -> None:
    """The message names the layer, the value and what would work."""
    cut = program_of(BatchStatistics(what), "script").cut(TapName("body"))
    with pytest.raises(Unsupported, match=rf"layer 'body' .*{named}.*crosses.*choose the last layer") as refused:
        cut.spread(cut.front(torch.randn(1, 3, 4, 4))[1], 4)

    assert Reason.LAYER_UNUSABLE == refused.value.reason


def test_only_one_row_can_be_spread_and_only_once() -> None:
    """Anything else is the caller's mistake."""
    cut = program_of(resnet(), "script").cut(TapName("layer2.1.conv1"))
    _, two = cut.front(torch.randn(2, 3, 32, 32))
    _, one = cut.front(torch.randn(1, 3, 32, 32))
    for crossing, rows in ((two, 4), (cut.spread(one, 4), 2), (one, 0)):
        with pytest.raises(ValueError, match="row"):
            cut.spread(crossing, rows)


@pytest.mark.parametrize(
    ("once", "twice", "growth"),
    [
        (3, 6, "count"),
        (3, 3, None),
        (0, 0, None),
        (True, True, None),
        (None, None, None),
        ([1, 64], [2, 64], ("count", None)),
        ({"size": (1, "a")}, {"size": (2, "a")}, (("count", None),)),
        (torch.zeros(4, 1), torch.zeros(4, 2), Along(dim=1)),
        (torch.arange(2), torch.arange(2), None),
        (torch.arange(2), torch.tensor([0, 1, 0, 1]), Along(dim=0)),
        (torch.arange(2), torch.tensor([0, 0, 1, 1]), Along(dim=0, is_interleaved=True)),
    ],
)
def test_growth_is_told_by_size_and_order(once: Any, twice: Any, growth: Any) -> None:
    """And the value for two rows, made from it, is the one seen."""
    found = growth_of(once, twice)

    assert growth == found
    assert str(twice) == str(grown(once, found, 2, is_expanded=True)) == str(grown(once, found, 2, is_expanded=False))


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        (3, 7),
        (True, False),
        (1.0, 2.0),
        ([1], [1, 1]),
        (torch.zeros(2, 2), torch.zeros(4, 4)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(4)),
        (torch.zeros(2), torch.zeros(2, 2)),
    ],
)
def test_growth_that_could_be_several_is_none(once: Any, twice: Any) -> None:
    """Also where both orders of the rows would look alike."""
    with pytest.raises(Ambiguous):
        growth_of(once, twice)

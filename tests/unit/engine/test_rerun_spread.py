import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import flop_counter

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import ExportProgram, load_export
from camserve.server.engine.export_cut import ExportCut
from camserve.server.engine.hooked import HookedProgram
from camserve.server.engine.program import TapName
from camserve.server.errors import Unsupported

CPU = torch.device("cpu")
SIZE = 64
# The end of a stage; the middle of a residual block, where the block's input crosses; inside a growing concatenation.
LAYERS = {
    "resnet18": ("layer4", "layer4.0.bn1", "layer3.1.relu#0", "layer2.0.downsample", "avgpool"),
    "densenet121": ("features.norm5", "features.denseblock4.denselayer3.conv1", "features.denseblock4.denselayer2"),
}


def exported(network: nn.Module, inputs: Tensor, *, is_dynamic: bool = True) -> ExportProgram:
    """The network, through a file."""
    stream = io.BytesIO()
    with torch.no_grad():
        batch = ({0: torch.export.Dim("batch", min=1, max=64)},) if is_dynamic else None
        torch.export.save(torch.export.export(network, (inputs,), dynamic_shapes=batch), stream)
    stream.seek(0)
    return load_export(stream, device=CPU)


@pytest.fixture(scope="module", params=LAYERS)
def loaded(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Mapping[str, HookedProgram]]:
    """A network and its programs."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(request.param, weights=None).eval()
    programs = {"eager": EagerProgram(network, device=CPU), "export": exported(network, torch.randn(2, 3, SIZE, SIZE))}
    return request.param, network, programs


def ablated(activation: Tensor, rows: int) -> Tensor:
    """Copies of one row, each without another channel."""
    changed = activation.repeat(rows, *[1] * (activation.dim() - 1))
    for row in range(rows):
        changed[row, row] = 0
    return changed


def by_hook(network: nn.Module, tap: TapName, inputs: Tensor, rows: int) -> Any:
    """The whole forward on every copy, with a hook that ablates."""
    calls = 0

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        if tap.call is not None and calls - 1 != tap.call:
            return None
        for row in range(rows):
            output[row, row] = 0  # In place, as the layer's caller may hold it under another name.
        return output

    handle = network.get_submodule(tap.path).register_forward_hook(hook)
    with torch.no_grad():
        outputs = network(inputs.expand(rows, -1, -1, -1).clone())
    handle.remove()
    return outputs


@pytest.mark.parametrize("kind", ["eager", "export"])
def test_a_spread_tail_is_the_whole_forward_with_an_ablation(
    loaded: tuple[str, nn.Module, Mapping[str, HookedProgram]], kind: str
) -> None:
    """Wherever the cut is, and whatever else crosses it."""
    name, network, programs = loaded
    inputs, program = torch.randn(1, 3, SIZE, SIZE), programs[kind]
    program.run(inputs)
    for layer in LAYERS[name]:
        tap = TapName.parse(layer)
        cut = program.cut(tap)
        activation, crossing = cut.front(inputs)
        for rows in (1, 3, 7):
            expected = by_hook(network, tap, inputs, rows)

            found = cut.tail(ablated(activation, rows), cut.spread(crossing, rows))

            assert float((expected - found).abs().max()) <= 2e-6 * float(expected.abs().max()), (layer, rows)
        assert torch.equal(program.run(inputs), cut.tail(activation, crossing)), layer


@pytest.mark.parametrize("kind", ["eager", "export"])
def test_a_tail_costs_what_lies_behind_the_tap(
    loaded: tuple[str, nn.Module, Mapping[str, HookedProgram]], kind: str
) -> None:
    """At the last layer that is the classifier: ten rows take less arithmetic than a hundredth of one forward."""
    name, _, programs = loaded
    inputs, program = torch.randn(1, 3, SIZE, SIZE), programs[kind]
    with flop_counter.FlopCounterMode(display=False) as whole:
        program.run(inputs)
    cut = program.cut(TapName(LAYERS[name][0]))
    activation, crossing = cut.front(inputs)
    spread = cut.spread(crossing, 10)

    with flop_counter.FlopCounterMode(display=False) as part:
        cut.tail(ablated(activation, 10), spread)

    assert part.get_total_flops() < whole.get_total_flops() / 20
    assert kind != "export" or isinstance(cut, ExportCut)


class KeepsItsBatchSize(nn.Module):
    """Asks for the batch size before the tap and uses it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        rows = x.shape[0]
        x = x[:, :, :8, :8] * 2
        y = self.conv(x)
        y += x.sum(1, keepdim=True)
        scores: Tensor = self.head(y.view(rows, -1))
        return scores


class Heads(nn.Module):
    """Folds rows into heads before the tap, either way, and uses them afterwards; the order matters only in what crosses."""

    def __init__(self, *, is_between: bool) -> None:
        super().__init__()
        self.is_between = is_between
        self.fold = nn.Conv2d(3, 4, 8, stride=8)
        self.conv = nn.Conv2d(3, 4, 8, stride=8)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        folded = self.fold(x).flatten(2)
        if self.is_between:
            folded = folded.transpose(0, 1)
        folded = folded.flatten(0, 1)
        y = self.conv(x).flatten(2)
        rows = y.shape[0]
        y = y.transpose(0, 1).flatten(0, 1) if self.is_between else y.flatten(0, 1)
        scores: Tensor = self.head(
            (y * folded).view(rows, 4, 64).sum(1) if not self.is_between else self.apart(y * folded, rows)
        )
        return scores

    def apart(self, y: Tensor, rows: int) -> Tensor:
        """Rows apart again."""
        return y.view(4, rows, 64).sum(0)


@pytest.mark.parametrize(
    "load", [exported, lambda network, _: EagerProgram(network, device=CPU)], ids=["export", "eager"]
)
@pytest.mark.parametrize("make", [KeepsItsBatchSize, lambda: Heads(is_between=False), lambda: Heads(is_between=True)])
def test_sizes_and_folded_rows_cross_too(load: Callable[..., HookedProgram], make: Callable[[], nn.Module]) -> None:
    """A batch size in a variable is multiplied; rows that are folded into another dimension are told from their order."""
    torch.manual_seed(0)
    network, inputs, tap = make().eval(), torch.randn(1, 3, SIZE, SIZE), TapName("conv")
    program = load(network, torch.randn(2, 3, SIZE, SIZE))
    program.run(inputs)
    cut = program.cut(tap)
    activation, crossing = cut.front(inputs)

    found = cut.tail(ablated(activation, 4), cut.spread(crossing, 4))

    assert torch.allclose(by_hook(network, tap, inputs, 4), found, rtol=1e-5, atol=1e-6)


class Mixes(nn.Module):
    """What crosses depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 4)."""
        total = self.total(x.sum(0, keepdim=True))
        return (self.conv(x) * total).mean((2, 3))


@pytest.mark.parametrize(
    "load", [exported, lambda network, _: EagerProgram(network, device=CPU)], ids=["export", "eager"]
)
def test_values_that_belong_to_no_row_are_refused(load: Callable[..., HookedProgram]) -> None:
    """Rather than guessed at."""
    inputs = torch.randn(1, 3, 8, 8)
    program = load(Mixes().eval(), torch.randn(2, 3, 8, 8))
    program.run(inputs)
    cut = program.cut(TapName("conv"))
    _, crossing = cut.front(inputs)

    with pytest.raises(
        Unsupported, match=r"program cannot be resumed at layer 'conv#0' .* belongs to the row; .*choose a later layer"
    ):
        cut.spread(crossing, 4)


def test_an_export_for_one_row_is_refused() -> None:
    """With what would help."""
    inputs = torch.randn(1, 3, SIZE, SIZE)
    program = exported(Heads(is_between=False).eval(), inputs, is_dynamic=False)
    program.run(inputs)
    cut = program.cut(TapName("conv"))
    _, crossing = cut.front(inputs)

    with pytest.raises(Unsupported, match="does not run on two rows; export the model with a dynamic batch"):
        cut.spread(crossing, 4)


@pytest.mark.parametrize(
    "load", [exported, lambda network, _: EagerProgram(network, device=CPU)], ids=["export", "eager"]
)
def test_only_one_row_is_spread(load: Callable[..., HookedProgram]) -> None:
    """Two rows are no copies of each other."""
    inputs = torch.randn(2, 3, SIZE, SIZE)
    program = load(Heads(is_between=False).eval(), inputs)
    program.run(inputs)
    cut = program.cut(TapName("conv"))
    _, crossing = cut.front(inputs)

    with pytest.raises(ValueError, match="one row"):
        cut.spread(crossing, 4)


class WritesUnderAnotherName(nn.Module):
    """A view from before the tap and the tapped value's own memory are written to after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 4)."""
        x = self.conv(x)
        whole, part = x * 2, x[:, :2]
        y = self.last(self.relu(whole))
        part += y[:, :2]
        y *= 2
        return (x + y + whole).mean((2, 3))


@pytest.mark.parametrize(
    "load", [exported, lambda network, _: EagerProgram(network, device=CPU)], ids=["export", "eager"]
)
@pytest.mark.parametrize("layer", ["conv", "relu", "last"])
def test_memory_with_two_names_is_minded(load: Callable[..., HookedProgram], layer: str) -> None:
    """What the tail writes to one name shows under the other."""
    torch.manual_seed(0)
    network, inputs, tap = WritesUnderAnotherName().eval(), torch.randn(1, 3, 4, 4), TapName(layer)
    program = load(network, torch.randn(2, 3, 4, 4))
    program.run(inputs)
    cut = program.cut(tap)
    activation, crossing = cut.front(inputs)

    assert torch.equal(program.run(inputs), cut.tail(activation, crossing))
    found = cut.tail(ablated(activation, 3), cut.spread(crossing, 3))
    assert torch.allclose(by_hook(network, tap, inputs, 3), found, rtol=1e-5, atol=1e-6)

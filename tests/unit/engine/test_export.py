import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import ExportProgram, load_export
from camserve.server.engine.program import Program, ProgramKind, TapName
from camserve.server.errors import NotFound, Unsupported

CPU = torch.device("cpu")


class Block(nn.Module):
    """A convolution and one in-place activation used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.relu(self.conv(self.relu(x)) + x)


class Pair(nn.Module):
    """Returns two maps."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two of the same shape."""
        return x * 2, x.sin()


class Net(nn.Module):
    """A block called twice, an in-place addition, a layer with two outputs, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = Block()
        self.pair = Pair()
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(b, 3, h, w) to (b, 5) under `out`."""
        x = self.norm(self.conv(images))
        x += 1
        low, high = self.pair(self.block(self.block(x) - 0.5))
        return {"out": self.head((low * high).mean((2, 3))), "low": low}


LAYERS = ("conv", "norm", "block.relu#0", "block.relu#3", "block#0", "block", "block.conv", "pair:0", "pair:1", "head")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def archived(module: nn.Module, inputs: Tensor, *, is_dynamic: bool = True) -> io.BytesIO:
    """The bytes of a `.pt2` archive."""
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},) if is_dynamic else None
    stream = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(module.eval(), (inputs,), dynamic_shapes=batch), stream)
    stream.seek(0)
    return stream


def capture(program: Program, inputs: Tensor, *names: str) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Outputs, activations and the gradients of the summed scores."""
    taps = [TapName.parse(name) for name in names]
    taken = program.capture(taps, inputs)
    activations = [taken.activations[tap] for tap in taps]
    return taken.outputs, activations, list(torch.autograd.grad(taken.outputs["out"].sum(), activations))


@pytest.fixture
def net() -> Net:
    """The eager network."""
    return Net()


@pytest.fixture
def program(net: Net) -> ExportProgram:
    """It, saved with a dynamic batch and loaded."""
    return load_export(archived(net, torch.randn(2, 3, 6, 6)), device=CPU)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_export_agrees_with_the_eager_model(net: Net, program: ExportProgram, rows: int) -> None:
    """Outputs with their keys, activations and gradients, bit for bit, at any batch size it was exported for."""
    inputs = torch.randn(rows, 3, 6, 6)

    expected, activations, gradients = capture(EagerProgram(net, device=CPU), inputs, *LAYERS[:-1])
    outputs, found, found_gradients = capture(program, inputs, *LAYERS[:-1])

    assert ProgramKind.EXPORT == program.kind
    assert expected.keys() == outputs.keys()
    assert torch.equal(expected["out"], outputs["out"])
    for name, *pair in zip(LAYERS, activations, found, strict=False):
        assert torch.equal(*pair), name
    for name, *pair in zip(LAYERS, gradients, found_gradients, strict=False):
        assert torch.equal(*pair), name


def test_calls_tensors_and_weights_are_those_of_the_eager_model(net: Net, program: ExportProgram) -> None:
    """Names survive exporting, so that one card fits either file."""
    eager = EagerProgram(net, device=CPU)
    inputs = torch.randn(2, 3, 6, 6)
    eager.run(inputs)
    program.run(inputs)

    assert list(eager.calls()) == list(program.calls())
    assert eager.tensors().keys() == program.tensors().keys()
    assert eager.digests().weights == program.digests().weights


def test_nothing_requires_grad_and_no_hooks_stay(program: ExportProgram) -> None:
    """Exported parameters arrive trainable; the program freezes them."""
    capture(program, torch.randn(2, 3, 6, 6), *LAYERS[:3])

    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in program.tensors().values())
    assert not any(child._forward_hooks for child in program._module.modules())


@pytest.mark.parametrize("name", LAYERS[:-1])
def test_front_then_tail_is_the_whole(program: ExportProgram, name: str) -> None:
    """Bit for bit, although graph interpreters wrap exceptions that pass through them."""
    inputs = torch.randn(2, 3, 6, 6)
    expected, (a,), (g,) = capture(program, inputs, name)

    activation, crossing = program.cut(TapName.parse(name)).front(inputs)
    leaf = activation.clone().requires_grad_()
    outputs = program.cut(TapName.parse(name)).tail(leaf, crossing)

    assert torch.equal(a, activation)
    assert torch.equal(expected["out"], outputs["out"])
    assert torch.equal(g, torch.autograd.grad(outputs["out"].sum(), leaf)[0])


def test_a_static_batch_refuses_others(net: Net) -> None:
    """By its own guard, before anything is computed; the probe finds out which size it takes."""
    program = load_export(archived(net, torch.randn(2, 3, 6, 6), is_dynamic=False), device=CPU)

    with pytest.raises(RuntimeError, match="to be equal to 2, but got 3"):
        program.run(torch.randn(3, 3, 6, 6))
    assert (2, 5) == program.run(torch.randn(2, 3, 6, 6))["out"].shape


def test_a_layer_that_did_nothing_is_not_called() -> None:
    """Exporting leaves no trace of an identity; the refusal says that a forward never calls it."""
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Flatten(), nn.Linear(16, 2))
    program = load_export(archived(module, torch.randn(2, 3, 2, 2)), device=CPU)

    with pytest.raises(Unsupported, match="never calls it"):
        program.capture([TapName("1")], torch.randn(2, 3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_are_cast(net: Net, dtype: torch.dtype) -> None:
    """A program computes in the dtype it is asked for."""
    program = load_export(archived(net, torch.randn(2, 3, 6, 6)), device=CPU, dtype=dtype)

    assert dtype == program.run(torch.randn(2, 3, 6, 6, dtype=dtype))["out"].dtype


def test_a_path_is_read_and_other_files_are_refused(tmp_path: Path, net: Net) -> None:
    """The message tells how such a file is written."""
    good, bad = tmp_path / "net.pt2", tmp_path / "weights.pt2"
    good.write_bytes(archived(net, torch.randn(2, 3, 6, 6)).getvalue())
    torch.save(net.state_dict(), bad)

    assert (2, 5) == load_export(good, device=CPU).run(torch.randn(2, 3, 6, 6))["out"].shape
    with pytest.raises(Unsupported, match=r"torch\.export\.save"):
        load_export(bad, device=CPU)
    with pytest.raises(Unsupported, match=r"torch\.export\.save"):
        load_export(io.BytesIO(b"no archive"), device=CPU)
    with pytest.raises(NotFound, match="there is no file"):
        load_export(tmp_path / "none.pt2", device=CPU)

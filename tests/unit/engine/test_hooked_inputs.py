import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import ExportProgram, load_export
from camserve.server.engine.hooked import HookedProgram
from camserve.server.engine.program import TapName

CPU = torch.device("cpu")
TAPS = [TapName.parse(name) for name in ("conv", "norm", "relu#0", "relu", "body")]


class Net(nn.Module):
    """Normalises its input in place, has in-place activations and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        images = images.sub_(0.5)
        x = self.relu(self.norm(self.conv(images)))
        y = self.body(x)
        y += x
        scores: Tensor = self.head(self.relu(y).mean((2, 3)))
        return scores


def exported(network: nn.Module, inputs: Tensor) -> ExportProgram:
    """The network, through a file."""
    stream = io.BytesIO()
    torch.export.save(torch.export.export(network, (inputs,)), stream)
    stream.seek(0)
    return load_export(stream, device=CPU)


@pytest.fixture(params=["eager", "exported"])
def load(request: pytest.FixtureRequest) -> Callable[[nn.Module, Tensor], HookedProgram]:
    """Both kinds of program that hooks tap."""
    torch.manual_seed(0)
    return exported if request.param == "exported" else lambda network, _: EagerProgram(network, device=CPU)


def test_an_input_that_requires_grad_has_the_gradient_of_plain_autograd(
    load: Callable[[nn.Module, Tensor], HookedProgram],
) -> None:
    """Bit for bit, with and without taps, also for a model that changes its input in place; the input keeps its bytes."""
    network, inputs = Net().eval(), torch.randn(2, 3, 8, 8)
    program = load(network, inputs.clone())
    leaf = inputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(leaf.clone()).sum(), leaf)

    for taps in ([], TAPS):
        found = program.capture(taps, leaf)

        assert torch.equal(expected, torch.autograd.grad(found.outputs.sum(), leaf)[0])
    assert torch.equal(inputs, leaf)


def test_taps_keep_their_bits_and_lie_on_the_inputs_graph(load: Callable[[nn.Module, Tensor], HookedProgram]) -> None:
    """Values and gradients at taps are the same with and without; with, each can be differentiated back to the input."""
    inputs = torch.randn(2, 3, 8, 8)
    program = load(Net().eval(), inputs.clone())
    leaf = inputs.clone().requires_grad_()
    without, found = program.capture(TAPS, inputs), program.capture(TAPS, leaf)
    values, expected = list(found.activations.values()), list(without.activations.values())

    gradients = torch.autograd.grad(found.outputs.sum(), values, retain_graph=True)

    assert all(torch.equal(*pair) for pair in zip(expected, values, strict=True))
    assert all(map(torch.equal, torch.autograd.grad(without.outputs.sum(), expected), gradients))
    assert not any(value.is_leaf for value in values)
    assert all(torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0].any() for value in values)


def test_without_gradients_there_is_no_graph(load: Callable[[nn.Module, Tensor], HookedProgram]) -> None:
    """Whatever the input says."""
    inputs = torch.randn(2, 3, 8, 8)
    found = load(Net().eval(), inputs.clone()).capture(TAPS, inputs.requires_grad_(), differentiable=False)

    assert not found.outputs.requires_grad
    assert not any(value.requires_grad for value in found.activations.values())

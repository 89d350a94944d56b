import io
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops.misc import FrozenBatchNorm2d

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import ExportProgram, load_export
from camserve.server.engine.hooked import HookedProgram
from camserve.server.engine.program import TapName
from camserve.server.errors import Unavailable, Unsupported

CPU = torch.device("cpu")


def exported(network: nn.Module, inputs: Tensor) -> ExportProgram:
    """The network, through a file, in float64."""
    stream = io.BytesIO()
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        torch.export.save(torch.export.export(network, (inputs,), dynamic_shapes=(batch,)), stream)
    stream.seek(0)
    return load_export(stream, device=CPU, dtype=torch.float64)


def decomposed(network: nn.Module, inputs: Tensor) -> ExportProgram:
    """The network in the operators of core ATen."""
    with torch.no_grad():
        program = torch.export.export(network, (inputs,)).run_decompositions()
    return ExportProgram(program, device=CPU, dtype=torch.float64)


def eager(network: nn.Module, inputs: Tensor) -> EagerProgram:
    """The network itself, run once."""
    program = EagerProgram(network, device=CPU, dtype=torch.float64)
    program.run(inputs.double())
    return program


LOADS = pytest.mark.parametrize("load", [eager, exported], ids=["eager", "export"])


class Folded(nn.Module):
    """Norms of all kinds, frozen ones, a transposed convolution, a linear layer on the last of three axes, one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.frozen = FrozenBatchNorm2d(6)
        self.bare = nn.BatchNorm2d(6, affine=False)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.slope = nn.PReLU(6)
        self.shared = nn.Conv2d(6, 6, 1)
        self.silent = nn.Conv2d(6, 6, 1, bias=False)
        self.line = nn.Conv1d(6, 6, 3)
        self.line_norm = nn.BatchNorm1d(6)
        self.tokens = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        x = self.relu(self.bare(self.frozen(self.stem(x))))
        x = self.shared(self.slope(self.shared(self.up(x))))
        x = self.silent(self.relu(x)) + x
        x = self.tokens(functional.relu(self.line_norm(self.line(x.flatten(2)))).transpose(1, 2))
        return self.head(self.relu(x).mean(1))


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norms that do something, and biases that are not zero."""
    for module in network.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in {"running_mean", "bias"}:
                tensor.data.normal_(0, 0.3)
            if name == "running_var":
                tensor.data.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("load", [eager, exported, decomposed], ids=["eager", "export", "decomposed export"])
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "folded"])
def test_inputs_and_biases_explain_the_whole_score(load: Callable[..., HookedProgram], name: str) -> None:
    """FullGrad's completeness (arXiv:1905.00780, proposition 1): x·dy/dx + Σ b·dy/db is the score, to 1e-9 in float64."""
    network = Folded() if name == "folded" else torchvision.models.get_model(name, weights=None, num_classes=5)
    inputs = torch.randn(2, 3, 32 if name == "resnet18" else 8, 32 if name == "resnet18" else 8)
    if name == "vgg11_bn":
        network.features = network.features[:11]
        network.classifier = nn.Sequential(nn.Linear(256 * 49, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5))
    program = load(with_statistics(network), inputs)
    biases = program.biases()

    leaf = inputs.double().requires_grad_()
    captured = program.capture(list(biases), leaf)
    values = [captured.activations[tap] for tap in biases]
    for target in (1, 4):
        score = captured.outputs[:, target]
        gradients = torch.autograd.grad(score.sum(), [leaf, *values], retain_graph=True)
        total = (leaf * gradients[0]).flatten(1).sum(1)
        for (tap, bias), gradient in zip(biases.items(), gradients[1:], strict=True):
            is_last = isinstance(network.get_submodule(tap.path), nn.Linear)
            moved = gradient.movedim(-1, 1) if is_last else gradient
            total = total + (moved.flatten(2).sum(2) if moved.dim() > 2 else moved) @ bias

        assert torch.allclose(score, total, rtol=1e-9, atol=1e-9)


@LOADS
def test_biases_come_in_order_with_their_calls(load: Callable[..., HookedProgram]) -> None:
    """A layer that is called twice is there twice; one that adds nothing is not there."""
    network = with_statistics(Folded())
    program = load(network, torch.randn(2, 3, 8, 8))

    names = [str(tap) for tap in program.biases()]

    layers = [
        "stem#0",
        "frozen#0",
        "bare#0",
        "up#0",
        "shared#0",
        "shared#1",
        "line#0",
        "line_norm#0",
        "tokens#0",
        "head#0",
    ]
    assert layers == names
    assert torch.equal(network.stem.bias.detach().double(), program.biases()[TapName("stem", 0)])


class Adds(nn.Module):
    """Adds a parameter in the forward of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.place = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 4)."""
        return (self.conv(x) + self.place).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "eager_says", "export_says"),
    [
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(8)),
            r"layer '1' \(LayerNorm\) divides by",
            r"aten\.layer_norm\.default in layer '1' divides by",
            id="layer norm",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4, affine=False)),
            r"layer '1' \(GroupNorm\) divides by",
            r"aten\.group_norm\.default in layer '1' divides by",
            id="group norm",
        ),
        pytest.param(
            Adds,
            r"the model itself \(Adds\) uses tensors of its own \(place\)",
            r"aten\.add\.Tensor in the model itself brings in 'place'",
            id="parameter",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
            r"layer '0' \(BatchNorm2d\) normalises by the statistics of the batch",
            r"batch_norm\.default in layer '0' divides by",
            id="batch statistics",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(make: Callable[[], nn.Module], eager_says: str, export_says: str) -> None:
    """By layer, class or operator, with what else there is."""
    inputs = torch.randn(2, 3, 8, 8)

    with pytest.raises(Unsupported, match=f"{eager_says}.*use vanilla-backprop"):
        eager(make().eval(), inputs).biases()
    with pytest.raises(Unsupported, match=f"{export_says}.*use vanilla-backprop"):
        exported(make().eval(), inputs).biases()


class Inside(nn.Module):
    """Uses a layer's parameters without calling the layer, and has a layer that it does not use at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.unused = nn.Conv2d(3, 4, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 4, h, w)."""
        return functional.relu(functional.conv2d(x, self.conv.weight.to(self.scale.dtype), self.conv.bias))


def test_a_layer_that_is_used_without_being_called_is_refused() -> None:
    """Nothing that can be tapped returns its result; layers and parameters that are not used do not matter."""
    inputs = torch.randn(2, 3, 8, 8)

    with pytest.raises(Unsupported, match=r"aten\.conv2d\.default in the model itself is called as a function"):
        exported(Inside().eval(), inputs).biases()
    with pytest.raises(
        Unsupported, match=r"layer 'conv' \(Conv2d\) is never called, but others use its tensors \(weight, bias\)"
    ):
        eager(Inside().eval(), inputs).biases()


def test_a_normalised_weight_does_not_matter() -> None:
    """Weights that are computed leave the bias what it is."""
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU())

    (bias,) = eager(network, torch.randn(2, 3, 8, 8)).biases().values()

    assert torch.equal(network[0].bias, bias)


def test_an_overridden_forward_is_not_trusted() -> None:
    """A class that inherits a layer's parameters may do anything with them."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu() + 1

    with pytest.raises(Unsupported, match=r"'0' \(Standardised\) overrides the forward of its class"):
        eager(nn.Sequential(Standardised(3, 4, 1)), torch.randn(2, 3, 8, 8)).biases()


def test_calls_must_be_known() -> None:
    """Which layers an eager model calls is seen by running it."""
    with pytest.raises(Unavailable, match="run it once"):
        EagerProgram(nn.Sequential(nn.Conv2d(3, 4, 1)), device=CPU).biases()

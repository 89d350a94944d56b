"""Constants of affine layers, read from TorchScript graphs: with them FullGrad's sum is the logit."""
# The models are data: their class docstring, or the test, tells what they are.
# ruff: noqa: D102

import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from camserve.server.engine.program import TapName
from camserve.server.engine.script import ScriptProgram, load_script
from camserve.server.errors import Reason, Unsupported

HOWS = ["script", "trace", "freeze"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small convolutions on two threads of a busy machine wait more than they compute."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def program_of(model: nn.Module, how: str, dtype: torch.dtype = torch.float32, side: int = 32) -> ScriptProgram:
    """The model scripted, traced or frozen, saved and loaded."""
    model = model.eval().requires_grad_(requires_grad=False)
    archive = torch.jit.trace(model, torch.randn(2, 3, side, side)) if how == "trace" else torch.jit.script(model)
    stream = io.BytesIO()
    torch.jit.save(torch.jit.freeze(archive) if how == "freeze" else archive, stream)
    stream.seek(0)
    return load_script(stream, device=torch.device("cpu"), dtype=dtype)


def settled(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights of their own, as after a training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model


def incompleteness(program: ScriptProgram, side: int = 32) -> float:
    """How far FullGrad's sum is from the logits, as a share of the largest."""
    x, biases = torch.randn(2, 3, side, side, dtype=program.dtype, requires_grad=True), program.biases()
    capture = program.capture(list(biases), x)
    assert list(biases) == list(capture.activations)
    gradients = torch.autograd.grad(capture.outputs[:, 1].sum(), [x, *capture.activations.values()])
    total = (x * gradients[0]).flatten(1).sum(1)
    for bias, gradient in zip(biases.values(), gradients[1:], strict=True):
        assert bias.shape == (gradient.size(1),)
        total = total + (gradient.flatten(2).sum(2) if gradient.dim() > 2 else gradient) @ bias
    logits = capture.outputs[:, 1].detach()
    return float(((total.detach() - logits).abs() / logits.abs().max()).max())


class Functional(nn.Module):
    """Layers by function, one of them twice, inside a module whose output they are not; statistics without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.3)
        self.bias = nn.Parameter(torch.randn(4))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.matrix = nn.Parameter(torch.randn(4, 5))
        self.vector = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        for _ in range(2):
            x = functional.conv2d(x, self.weight, self.bias, padding=1).relu_()
        return self.up(x).relu().mean((2, 3)) @ self.matrix + self.vector


class Outer(nn.Module):
    """The same, one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Functional()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).relu())


def vgg() -> nn.Module:
    """Biases everywhere, also behind a dropout."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(8 * 8 * 8, 12), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(12, 5)),
    )


def resnet() -> nn.Module:
    """Convolutions without biases before batch norms, sums in place."""
    return torchvision.models.resnet18(num_classes=5)


def densenet() -> nn.Module:
    """Batch norms of concatenations."""
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("build", [resnet, vgg, densenet, Outer])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_input_and_biases_times_their_gradients_sum_to_the_logit(
    build: Callable[[], nn.Module], how: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Completeness (arXiv:1905.00780, eq. 4): no bias is missing, none counted twice."""
    assert incompleteness(program_of(settled(build()), how, dtype)) <= tolerance


@pytest.mark.parametrize("how", ["script", "trace"])
def test_biases_go_by_the_names_of_modules_in_order(how: str) -> None:
    """Layers that add nothing are left out; batch norms add what they shift by."""
    model = settled(resnet())
    biases = program_of(model, how).biases()
    norm = model.layer1[0].bn1
    shift = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()

    assert ["bn1", "layer1.0.bn1", "layer1.0.bn2"] == [str(tap) for tap in biases][:3]
    assert ["layer4.1.bn2", "fc"] == [str(tap) for tap in biases][-2:]
    assert 21 == len(biases)
    assert torch.allclose(shift, biases[TapName("layer1.0.bn1")], rtol=1e-6, atol=1e-7)
    assert torch.equal(model.fc.bias, biases[TapName("fc")])


def test_what_no_module_returns_goes_by_the_operator() -> None:
    """Functional layers, each call of one, and a sum behind a product that a module happens to return."""
    biases = program_of(Outer(), "script").biases()

    assert [
        *("inner.stem", "inner.norm", "op.conv2d#1", "op.conv2d#2", "inner.up", "inner", "last"),
    ] == [str(tap) for tap in biases]


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu()).mean((2, 3))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_layer_called_twice_is_listed_once_a_call(how: str) -> None:
    """Each call has its own gradient."""
    program = program_of(Twice(), how)

    assert ["conv#0", "conv#1"] == [str(tap) for tap in program.biases()]
    assert incompleteness(program) <= 1e-4


class Overwrites(nn.Module):
    """Returns its convolution's output, overwritten: at that place it is no affine layer's output any more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.conv2d(x, self.weight, self.bias)
        y.relu_()
        return y


def test_a_module_that_overwrites_what_it_returns_does_not_name_the_layer_inside() -> None:
    """The bias counts where it was added."""
    program = program_of(
        nn.Sequential(Overwrites(), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "script"
    )

    assert ["op.conv2d#0", "1"] == [str(tap) for tap in program.biases()]
    assert incompleteness(program) <= 1e-4


class Unclear(nn.Module):
    """A bias that is computed, statistics of the batch, a layer in a branch, and a recurrent one."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.lstm = nn.LSTM(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "computed":
            return functional.conv2d(x, self.conv.weight, x.mean((0, 2, 3)))
        if self.what == "batch":
            return self.norm(x)
        if self.what == "branch":
            return self.conv(x) if bool(x.sum() > 0) else x
        return self.lstm(x.mean(3).permute(2, 0, 1))[0]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("computed", r"layer 'op.conv2d'.*its bias is computed"),
        ("batch", r"layer 'norm'.*statistics of the batch"),
        ("branch", r"layer 'conv'.*in a branch"),
        ("lstm", r"aten::lstm.*whole layers"),
    ],
)
def test_a_constant_that_cannot_be_told_is_refused(what: str, named: str) -> None:
    """A sum that misses one would be wrong without a word."""
    with pytest.raises(Unsupported, match=named) as refused:
        program_of(Unclear(what), "script").biases()

    assert Reason.METHOD_UNSUPPORTED_BY_MODEL == refused.value.reason


def test_layers_that_are_not_affine_are_not_listed() -> None:
    """Layer norm depends on its input's statistics; of a transformer only the linear layers are listed."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 2))

    assert ["0", "4"] == [str(tap) for tap in program_of(model, "script", side=4).biases()]

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torchvision
from captum.attr import Deconvolution, GuidedBackprop
from torch import Tensor, nn
from torch.nn import functional

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import ExportProgram, load_export
from camserve.server.engine.hooked import HookedProgram
from camserve.server.engine.program import BackwardRule, TapName
from camserve.server.errors import Unsupported

CPU = torch.device("cpu")
RULES = (BackwardRule.GUIDED, BackwardRule.DECONVNET)


class Skips(nn.Module):
    """A residual block whose one activation is called twice, a ReLU6, and an in-place activation whose result nobody takes."""

    def __init__(self, *, is_in_place: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=is_in_place)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.six = nn.ReLU6(inplace=is_in_place)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        x = self.relu(self.stem(x))
        y = self.body(x)
        y += x
        if self.relu.inplace:
            self.relu(y)
        else:
            y = self.relu(y)
        scores: Tensor = self.head(self.six(8 * y).mean((2, 3)))
        return scores


class Functional(nn.Module):
    """Every way to write a ReLU without a module for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        x = self.stem(x)
        for conv, relu in zip(
            self.convs,
            (
                functional.relu,
                torch.relu,
                Tensor.relu_,
                Tensor.relu,
                lambda y: y.clamp(min=0),
                lambda y: y.clamp_min(0),
            ),
            strict=True,
        ):
            x = relu(conv(x))
        scores: Tensor = self.head(functional.relu6(3 * x).mean((2, 3)))
        return scores


def vgg() -> nn.Module:
    """Convolutions, in-place activations, one module for each, a classifier: what captum takes."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)),
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class _ByHand(torch.autograd.Function):
    """The rules as the papers state them, on a ReLU of any ceiling."""

    @staticmethod
    def forward(ctx, x: Tensor, ceiling: float, rule: BackwardRule) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ceiling, ctx.rule = ceiling, rule
        return x.clamp(0, ceiling)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        passed = gradient * (gradient > 0)
        if ctx.rule is BackwardRule.GUIDED:
            passed = passed * (x > 0) * (x < ctx.ceiling)
        return passed, None, None


def by_hand(network: nn.Module, rule: BackwardRule) -> nn.Module:
    """A copy in which every ReLU module is one by hand."""

    class Relu(nn.Module):
        def __init__(self, ceiling: float) -> None:
            super().__init__()
            self.ceiling = ceiling
            self.inplace = False

        def forward(self, x: Tensor) -> Tensor:
            return _ByHand.apply(x, self.ceiling, rule)

    changed = copy.deepcopy(network)
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(parent, name, Relu(6.0 if isinstance(child, nn.ReLU6) else float("inf")))
    return changed


def exported(network: nn.Module, inputs: Tensor) -> ExportProgram:
    """The network, through a file."""
    stream = io.BytesIO()
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        torch.export.save(torch.export.export(network, (inputs,), dynamic_shapes=(batch,)), stream)
    stream.seek(0)
    return load_export(stream, device=CPU)


def eager(network: nn.Module, _inputs: Tensor) -> EagerProgram:
    """The network itself."""
    return EagerProgram(copy.deepcopy(network), device=CPU)


def gradient(program: HookedProgram, inputs: Tensor, rule: BackwardRule) -> tuple[Tensor, Tensor]:
    """Scores, and each row's own class's gradient with respect to the input."""
    leaf = inputs.clone().requires_grad_()
    outputs = program.capture([], leaf, rule=rule).outputs
    return outputs.detach(), torch.autograd.grad(outputs[range(len(inputs)), classes(inputs)].sum(), leaf)[0]


def classes(inputs: Tensor) -> Tensor:
    """One class for each row."""
    return torch.arange(len(inputs)) % 5


def assert_near(expected: Tensor, found: Tensor) -> None:
    """Within 1e-6 of the largest value."""
    assert expected.any()
    assert float((expected - found).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("load", [eager, exported])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [vgg, Skips, lambda: Skips(is_in_place=False)], ids=["vgg", "in place", "skips"])
def test_gradients_are_those_of_the_papers(
    load: Callable[..., HookedProgram], rule: BackwardRule, make: Callable[[], nn.Module]
) -> None:
    """Written down by hand, for a batch whose rows want different classes; the forward keeps its bits."""
    network, inputs = make().eval(), torch.randn(3, 3, 16, 16)
    program = load(network, inputs)
    leaf = inputs.clone().requires_grad_()
    if isinstance(network, Skips):
        network.relu.inplace = False
    reference = by_hand(network, rule)
    expected = torch.autograd.grad(reference(leaf)[range(3), classes(inputs)].sum(), leaf)[0]

    scores, found = gradient(program, inputs, rule)

    assert torch.equal(program.run(inputs), scores)
    assert_near(expected, found)
    assert not torch.allclose(gradient(program, inputs, BackwardRule.PLAIN)[1], found)


@pytest.mark.parametrize("load", [eager, exported])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
def test_gradients_are_captums(load: Callable[..., HookedProgram], rule: BackwardRule) -> None:
    """Where captum can do it: one module for each activation."""
    network, inputs = vgg().eval(), torch.randn(3, 3, 16, 16)
    program = load(network, inputs)
    method = (GuidedBackprop if rule is BackwardRule.GUIDED else Deconvolution)(network)

    expected = method.attribute(inputs.clone().requires_grad_(), target=classes(inputs))

    assert_near(expected.detach(), gradient(program, inputs, rule)[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_architectures_agree_with_gates_by_hand(name: str, rule: BackwardRule) -> None:
    """Reused activations, concatenations with functional pooling, ReLU6."""
    network, inputs = torchvision.models.get_model(name, weights=None, num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    if name == "densenet121":
        network.features.add_module("last", nn.ReLU())
        network.forward = lambda x: network.classifier(network.features(x).mean((2, 3)))
    leaf = inputs.clone().requires_grad_()
    reference = by_hand(network, rule)
    if name == "densenet121":
        reference.forward = lambda x: reference.classifier(reference.features(x).mean((2, 3)))
    expected = torch.autograd.grad(reference(leaf)[range(2), classes(inputs)].sum(), leaf)[0]
    program = EagerProgram(network, device=CPU)

    scores, found = gradient(program, inputs, rule)

    assert torch.equal(program.run(inputs), scores)
    assert_near(expected, found)


def test_an_eager_model_with_functional_calls_is_refused() -> None:
    """The refusal names the rule, the kind, the place and the ways out; the model is left as it was."""
    network = torchvision.models.densenet121(weights=None).eval()
    program = EagerProgram(network, device=CPU)

    with pytest.raises(
        Unsupported,
        match=r"'guided'.* eager program.* aten\.relu_?\.default in the model itself \(DenseNet\).*nn\.ReLU.* exported",
    ):
        program.capture([], torch.randn(1, 3, 32, 32), rule=BackwardRule.GUIDED)
    assert is_untouched(network)


@pytest.mark.parametrize(
    "call",
    [
        functional.relu,
        torch.relu,
        Tensor.relu,
        Tensor.relu_,
        functional.relu6,
        lambda x: x.clamp(min=0),
        lambda x: x.clamp_min(0),
    ],
)
def test_each_spelling_alone_is_refused(call: Callable[[Tensor], Tensor]) -> None:
    """In the submodule that calls it."""

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x * 2)

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Calls())

    with pytest.raises(Unsupported, match=r"in '2' \(Calls\)"):
        EagerProgram(network, device=CPU).capture([], torch.randn(1, 3, 8, 8), rule=BackwardRule.GUIDED)


@pytest.mark.parametrize("rule", RULES)
def test_functional_calls_are_gated_in_an_export(rule: BackwardRule) -> None:
    """Every spelling of them."""
    network, inputs = Functional().eval(), torch.randn(2, 3, 8, 8)
    leaf = inputs.clone().requires_grad_()

    def reference(x: Tensor) -> Tensor:
        x = _ByHand.apply(network.stem[0](x), float("inf"), rule)
        for conv in network.convs:
            x = _ByHand.apply(conv(x), float("inf"), rule)
        return network.head(_ByHand.apply(3 * x, 6.0, rule).mean((2, 3)))

    expected = torch.autograd.grad(reference(leaf)[range(2), classes(inputs)].sum(), leaf)[0]
    program = exported(network, inputs)

    scores, found = gradient(program, inputs, rule)

    assert torch.equal(program.run(inputs), scores)
    assert_near(expected, found)


@pytest.mark.parametrize("load", [eager, exported])
def test_a_network_without_relus_is_refused_with_what_it_has(load: Callable[..., HookedProgram]) -> None:
    """Guided backpropagation of a GELU is not a thing."""
    network, inputs = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Flatten(), nn.Linear(256, 5)),
        torch.randn(2, 3, 8, 8),
    )

    with pytest.raises(Unsupported, match=r"'deconvnet'.*has none \(found: gelu\); use vanilla-backprop"):
        load(network.eval(), inputs).capture([], inputs, rule=BackwardRule.DECONVNET)


def is_untouched(network: nn.Module) -> bool:
    """No hooks, no replaced forward."""
    return not any(
        child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child) for child in network.modules()
    )


def test_an_exception_leaves_an_eager_model_as_it_was() -> None:
    """No hooks, no replaced forward, and the next capture works."""
    network = vgg().eval()
    program, inputs = EagerProgram(network, device=CPU), torch.randn(1, 3, 16, 16)
    expected = gradient(program, inputs, BackwardRule.GUIDED)

    with pytest.raises(RuntimeError):
        program.capture([], torch.randn(1, 4, 16, 16), rule=BackwardRule.GUIDED)

    assert is_untouched(network)
    assert torch.equal(expected[1], gradient(program, inputs, BackwardRule.GUIDED)[1])


def test_an_exception_leaves_an_export_as_it_was() -> None:
    """Every node calls its own operator again."""
    inputs = torch.randn(2, 3, 16, 16)
    program = exported(vgg().eval(), inputs)
    graphs = [str(child.graph) for child in program._module.modules() if hasattr(child, "graph")]

    with pytest.raises(RuntimeError):
        program.capture([], torch.randn(2, 4, 16, 16), rule=BackwardRule.GUIDED)

    assert graphs == [str(child.graph) for child in program._module.modules() if hasattr(child, "graph")]


@pytest.mark.parametrize("load", [eager, exported])
@pytest.mark.parametrize("rule", [BackwardRule.PLAIN, BackwardRule.GUIDED])
def test_gated_gradients_reach_taps(load: Callable[..., HookedProgram], rule: BackwardRule) -> None:
    """As Guided Grad-CAM needs them: activations keep their bits, the tap before is a leaf."""
    network, inputs = Skips().eval(), torch.randn(2, 3, 8, 8)
    program = load(network, inputs)
    taps = [TapName("stem"), TapName("relu", 0)]
    plain = program.capture(taps, inputs)

    found = program.capture(taps, inputs, rule=rule)

    assert all(torch.equal(plain.activations[tap], found.activations[tap]) for tap in taps)
    assert found.activations[taps[0]].is_leaf
    assert torch.autograd.grad(found.outputs.sum(), found.activations[taps[0]])[0].any()

"""TorchScript programs under guided and deconvnet rules, against hooks on the eager model; and gradients down to the input."""
# The models are data: their class docstring, or the test, tells what they are.
# ruff: noqa: D102

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from captum.attr import Deconvolution, GuidedBackprop
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from camserve.server.engine.program import BackwardRule, TapName
from camserve.server.engine.script import ScriptProgram, load_script
from camserve.server.errors import Reason, Unsupported

RULES = [BackwardRule.GUIDED, BackwardRule.DECONVNET]
HOWS = ["script", "trace"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bits are compared at equal thread counts."""
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


def input_gradient(forward: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, gradient of the second logit of each row with respect to the input)."""
    leaf = x.clone().requires_grad_()
    outputs = forward(leaf)
    (gradient,) = torch.autograd.grad(outputs[:, 1].sum(), leaf)
    return outputs.detach(), gradient


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((expected - got).abs().max() / expected.abs().max())


class RuleMode(TorchFunctionMode):
    """The rule on an eager model, modules or not: hooks on what goes into each rectifier and on what comes out of it."""

    RECTIFIERS = frozenset(
        {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp_min", "_threshold", "threshold", "threshold_"}
    )

    def __init__(self, rule: BackwardRule) -> None:
        super().__init__()
        self.rule = rule
        self.met = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in self.RECTIFIERS:
            return func(*args, **kwargs)
        self.met += 1
        with torch._C.DisableTorchFunction():
            if self.rule is BackwardRule.GUIDED:
                outputs = func(*args, **kwargs)
                outputs.register_hook(lambda gradient: gradient.clamp_min(0))
                return outputs
            # Adding zero passes every gradient on, whatever the sign of the input.
            kept = args[0]
            rectified = func(kept.detach().clone(), *args[1:], **kwargs)
            outputs = kept + (rectified - kept).detach()
            outputs.register_hook(lambda gradient: gradient.clamp_min(0))
            return outputs


class Functional(nn.Module):
    """Every way to write a ReLU without a module, one of them in place, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.fourth = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = functional.relu(self.second(x), inplace=True)
        y = functional.relu6(self.third(y) * 20.0) + x
        y = self.fourth(y).clamp_min(0.0)
        y = functional.threshold(y - 0.1, 0.0, 0.0)
        return self.head(y.mean((2, 3)))


def vgg() -> nn.Module:
    """Convolutions with biases, ReLUs in place, pooling, two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(8 * 8 * 8, 12), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(12, 5)),
    )


def resnet() -> nn.Module:
    """A real one: in-place ReLUs used twice in a block, sums in place."""
    return torchvision.models.resnet18(num_classes=5)


def densenet() -> nn.Module:
    """A small one: concatenations, modules and one functional ReLU."""
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("build", [resnet, vgg])
@pytest.mark.parametrize(("rule", "oracle"), [(RULES[0], GuidedBackprop), (RULES[1], Deconvolution)])
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations:UserWarning")
def test_the_rules_are_captums(
    build: Callable[[], nn.Module], how: str, rule: BackwardRule, oracle: type[GuidedBackprop | Deconvolution]
) -> None:
    """Input gradients equal captum's hooks on the eager model, for a batch of two; logits keep their bits."""
    model, x = build().eval(), torch.randn(2, 3, 32, 32)
    program = program_of(model, how, x)
    outputs, gradient = input_gradient(lambda leaf: program.capture([], leaf, rule=rule).outputs, x)

    assert torch.equal(program.run(x), outputs)
    assert relative_difference(oracle(model).attribute(x.clone().requires_grad_(), target=1), gradient) <= 1e-6


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("build", [densenet, Functional])
@pytest.mark.parametrize("rule", RULES)
def test_functional_relus_follow_the_rule(build: Callable[[], nn.Module], how: str, rule: BackwardRule) -> None:
    """ReLUs that no module hook can see follow the rule as well."""
    model, x = build().eval(), torch.randn(3, 3, 32, 32)
    program = program_of(model, how, x)
    outputs, gradient = input_gradient(lambda leaf: program.capture([], leaf, rule=rule).outputs, x)
    mode = RuleMode(rule)
    with mode:
        _, expected = input_gradient(model, x)

    assert mode.met >= 5
    assert torch.equal(program.run(x), outputs)
    assert relative_difference(expected, gradient) <= 1e-6


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rule", RULES)
def test_taps_under_a_rule_keep_their_bits_and_get_its_gradient(how: str, rule: BackwardRule) -> None:
    """Guided Grad-CAM's pieces: activations are the plain ones, gradients stop where the rule says, also with an input's."""
    model, x = resnet().eval(), torch.randn(2, 3, 32, 32)
    program, taps = program_of(model, how, x), [TapName("layer3.0.conv2"), TapName("layer1.0.relu", call=0)]
    plain = program.capture(taps, x)
    ruled = program.capture(taps, x, rule=rule)
    from_input = program.capture(taps, x.clone().requires_grad_(), rule=rule)
    gradients = [
        torch.autograd.grad(capture.outputs[:, 1].sum(), list(capture.activations.values()))
        for capture in (plain, ruled, from_input)
    ]

    assert torch.equal(plain.outputs, ruled.outputs)
    assert [True] * 4 == [
        torch.equal(plain.activations[tap], other.activations[tap]) for other in (ruled, from_input) for tap in taps
    ]
    assert [True] * 2 == [torch.equal(a, b) for a, b in zip(gradients[1], gradients[2], strict=True)]
    assert not torch.equal(gradients[0][0], gradients[1][0])


class Branching(nn.Module):
    """ReLUs in a branch that the data decides and in a loop that the batch size decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if bool(y.sum() > 0):  # noqa: SIM108 - a statement on purpose
            y = torch.relu(y)
        else:
            y = torch.relu_(y + 0.2)
        for _ in range(x.size(0)):
            y = torch.relu(y - 0.05)
        return -y.mean((2, 3))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rule", RULES)
def test_relus_in_branches_and_loops_follow_the_rule(sign: float, rule: BackwardRule) -> None:
    """Whichever branch is taken."""
    model, x = Branching().eval(), torch.randn(2, 3, 8, 8)
    nn.init.constant_(model.conv.bias, sign)
    program = program_of(model, "script")
    outputs, gradient = input_gradient(lambda leaf: program.capture([], leaf, rule=rule).outputs.neg(), x)
    with RuleMode(rule):
        _, expected = input_gradient(lambda leaf: model(leaf).neg(), x)

    assert torch.equal(model(x).neg(), outputs)
    assert expected.any()
    assert relative_difference(expected, gradient) <= 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_other_activations_keep_their_derivative(rule: BackwardRule) -> None:
    """Leaky ReLU and SiLU beside a ReLU are left as they are, as captum leaves them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3))
    nn.init.constant_(model[4].bias, 1.0)
    model = nn.Sequential(model, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(2, 3, 12, 12)
    program = program_of(model, "script")
    _, gradient = input_gradient(lambda leaf: program.capture([], leaf, rule=rule).outputs, x)
    with RuleMode(rule):
        _, expected = input_gradient(model, x)

    assert relative_difference(expected, gradient) <= 1e-6


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("activation", "found"), [(nn.GELU(), "gelu"), (nn.SiLU(), "silu"), (nn.LeakyReLU(), "leaky_relu")]
)
def test_a_model_without_relus_is_refused(how: str, activation: nn.Module, found: str) -> None:
    """The message names the rule, the kind, what was found, and what works."""
    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), activation), how, torch.randn(1, 3, 8, 8))
    with pytest.raises(
        Unsupported, match=rf"guided .*torchscript.*none.*{found}.*vanilla-backprop and grad-cam"
    ) as refused:
        program.capture([], torch.randn(1, 3, 8, 8), rule=BackwardRule.GUIDED)

    assert Reason.METHOD_UNSUPPORTED_BY_MODEL == refused.value.reason


def test_second_derivatives_exist_under_a_rule() -> None:
    """The ruled operators can be differentiated twice, as the ones they stand for."""
    program, x = program_of(vgg(), "script"), torch.randn(1, 3, 32, 32, requires_grad=True)
    outputs = program.capture([], x, rule=BackwardRule.GUIDED).outputs.square()
    (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)

    assert torch.autograd.grad(gradient.square().sum(), x)[0].any()


def test_functions_are_kept_by_rule_and_a_forward_leaves_the_program_as_it_was() -> None:
    """Compiling happens once a rule; digests do not move."""
    program, x = program_of(resnet(), "script"), torch.randn(1, 3, 32, 32)
    before = program.digests()
    first = [
        program._form_of(rule, names_operators=False) for rule in BackwardRule if rule is not BackwardRule.ATTENTION
    ]
    for rule in (*RULES, BackwardRule.PLAIN):
        program.capture([TapName("layer4")], x, rule=rule)

    again = [program._form_of(rule, names_operators=False) for rule in (BackwardRule.PLAIN, *RULES)]

    assert [True] * 3 == [one is other for one, other in zip(first, again, strict=True)]
    assert [1, 1, 1] == [len(form._tapped) for form in first]
    assert before == program.digests()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("build", [resnet, densenet, vgg, Functional])
def test_input_gradients_are_the_eager_ones(build: Callable[[], nn.Module], how: str) -> None:
    """Bit for bit, with taps or without, and what is tapped has the bits it has without an input's gradient."""
    model, x = build().eval(), torch.randn(2, 3, 32, 32)
    program = program_of(model, how, x)
    tap = TapName(program.calls()[len(program.calls()) // 2].path)
    leaf = x.clone().requires_grad_()
    with_input, without = program.capture([tap], leaf), program.capture([tap], x)
    gradients = torch.autograd.grad(with_input.outputs[:, 1].sum(), [leaf, with_input.activations[tap]])
    (alone,) = torch.autograd.grad(without.outputs[:, 1].sum(), without.activations[tap])
    expected = input_gradient(model, x)
    untapped = input_gradient(lambda leaf: program.capture([], leaf).outputs, x)

    assert [True, True] == [torch.equal(a, b) for a, b in zip(expected, untapped, strict=True)]
    assert torch.equal(expected[1], gradients[0])
    assert torch.equal(alone, gradients[1])
    assert torch.equal(without.activations[tap], with_input.activations[tap])
    assert (True, False) == (without.activations[tap].is_leaf, with_input.activations[tap].is_leaf)


def test_activations_are_differentiable_to_the_input() -> None:
    """Not only outputs: a score made of an activation reaches the input too."""
    model, x = resnet().eval(), torch.randn(2, 3, 32, 32, requires_grad=True)
    activation = program_of(model, "script").capture([TapName("layer1")], x).activations[TapName("layer1")]
    eager = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))

    assert torch.equal(
        torch.autograd.grad(eager.square().sum(), x)[0], torch.autograd.grad(activation.square().sum(), x)[0]
    )


def test_nothing_is_kept_without_grad_though_the_input_asks_for_it() -> None:
    """A capture that is not to be differentiated has no graph."""
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    capture = program_of(resnet(), "script").capture([TapName("layer1")], x, differentiable=False)

    assert (False, False) == (capture.outputs.requires_grad, capture.activations[TapName("layer1")].requires_grad)


class WritesItsInput(nn.Module):
    """Normalises in place, once as a schema tells and once as none does."""

    def __init__(self, *, openly: bool) -> None:
        super().__init__()
        self.openly = openly
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.sub_(0.5) if self.openly else x.type_as(x).sub_(0.5)
        return self.conv(y).relu().mean((2, 3))


@pytest.mark.parametrize("openly", [True, False])
def test_a_model_that_writes_its_input_is_differentiated_all_the_same(openly: bool) -> None:  # noqa: FBT001 - a case
    """The input is copied, so that its gradient exists and its values stay."""
    model = WritesItsInput(openly=openly).eval()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    before = x.detach().clone()
    (gradient,) = torch.autograd.grad(program_of(model, "script").capture([], x).outputs[:, 1].sum(), x)
    _, expected = input_gradient(lambda leaf: model(leaf.clone()), x.detach())

    assert torch.equal(expected, gradient)
    assert torch.equal(before, x.detach())


def test_operators_inside_modules_can_be_tapped() -> None:
    """`op.conv2d#1` is the second convolution of an archive that has module paths; those names stay beside them."""
    model, x = Functional().eval(), torch.randn(2, 3, 16, 16)
    program = program_of(model, "script")
    taps = [TapName("op.conv2d", call=1), TapName("second"), TapName("op.clamp_min")]
    capture = program.capture(taps, x, rule=BackwardRule.GUIDED)
    cut = program.cut(taps[0])

    assert torch.equal(capture.activations[taps[0]], capture.activations[taps[1]])
    assert bool((capture.activations[taps[2]] >= 0).all())
    assert torch.equal(program.run(x), cut.tail(*cut.front(x)))
    assert {"first", "second", "third", "fourth", "head"} == {call.path for call in program.calls()}

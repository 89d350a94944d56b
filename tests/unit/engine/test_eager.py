from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.program import Capture, ProgramKind, TapName
from camserve.server.errors import CamserveError, NotFound, Unavailable, Unsupported

CPU = torch.device("cpu")


class Net(nn.Module):
    """A convolution, whatever the test is about, and class scores."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = middle
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        return self.head(self.middle(self.conv(images)).mean((2, 3)))


class IdentityThenInPlace(nn.Module):
    """An identity layer whose caller then changes the tensor that it got back, and that it still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        y = self.identity(x)
        y += 1
        return (y * x).relu_()


class Twice(nn.Module):
    """One activation called twice, as in residual blocks, with a convolution between."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.relu(self.conv(self.relu(x)) + x)


class Pair(NamedTuple):
    """Two maps."""

    low: Tensor
    high: Tensor


class Split(nn.Module):
    """Returns two tensors in the container it is given."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.container = container

    def forward(self, x: Tensor) -> Any:
        """Two of the same shape."""
        return self.container(x * 2, x.sin())


class Joined(nn.Module):
    """Uses both outputs of a `Split`."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any], first: Any, second: Any) -> None:
        super().__init__()
        self.split = Split(container)
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        both = self.split(x)
        return both[self.first] * both[self.second].relu_()


class Raises(nn.Module):
    """Fails where told."""

    def __init__(self) -> None:
        super().__init__()
        self.is_failing = False

    def forward(self, x: Tensor) -> Tensor:
        """Same tensor."""
        if self.is_failing:
            raise ValueError("this layer fails")
        return x


CONTAINERS = {
    "tuple": (lambda a, b: (a, b), 0, 1),
    "list": (lambda a, b: [a, b], 0, 1),
    "named tuple": (Pair, 0, 1),
    "dict": (lambda a, b: {"low": a, "high": b}, "low", "high"),
    "ordered dict": (lambda a, b: OrderedDict(low=a, high=b), "low", "high"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(rows: int = 2) -> Tensor:
    """Noise, (rows, 3, 6, 6)."""
    return torch.randn(rows, 3, 6, 6)


def capture(program: EagerProgram, inputs: Tensor, *names: str) -> tuple[Capture, list[Tensor], list[Tensor]]:
    """A capture with its activations and the gradients of the summed scores, in the order of the names."""
    taken = program.capture([TapName.parse(name) for name in names], inputs)
    activations = [taken.activations[TapName.parse(name)] for name in names]
    return taken, activations, list(torch.autograd.grad(taken.outputs.sum(), activations))


def hook_count(module: nn.Module) -> int:
    """Hooks of every kind on a module and its children."""
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def is_untouched(module: nn.Module) -> bool:
    """No hooks, no replaced forward, no gradients."""
    return (
        hook_count(module) == 0
        and not any("forward" in vars(child) for child in module.modules())
        and all(parameter.grad is None for parameter in module.parameters())
    )


def test_construction_freezes_the_module_and_puts_it_in_eval_mode() -> None:
    """That is the contract: the one change that stays."""
    module = Net(nn.Identity())

    program = EagerProgram(module, device=CPU, dtype=torch.float64)

    assert ProgramKind.EAGER == program.kind
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.float64 == module.conv.weight.dtype


def test_an_in_place_layer_after_the_tap_does_not_reach_the_activation() -> None:
    """The activation is what the convolution returned, negative values and all, and its gradient belongs to it."""
    module = Net(nn.ReLU(inplace=True)).eval()
    inputs = images()
    conv = functional.conv2d(inputs, module.conv.weight, module.conv.bias, padding=1).detach().requires_grad_()
    scores = module.head(conv.relu().mean((2, 3)))
    (gradient,) = torch.autograd.grad(scores.sum(), conv)

    taken, (a,), (g,) = capture(EagerProgram(module, device=CPU), inputs, "conv")

    assert torch.equal(conv, a)
    assert torch.equal(gradient, g)
    assert torch.equal(scores, taken.outputs)


def test_an_identity_followed_by_in_place_operations_keeps_its_value_and_gradient() -> None:
    """The layer hands its caller's own tensor back; what the caller does to it afterwards is not the layer's value."""
    module = Net(IdentityThenInPlace()).eval()
    inputs = images()
    conv = module.conv(inputs).detach()
    identity = conv.clone().requires_grad_()
    scores = module.head(((identity + 1) * (identity + 1)).relu().mean((2, 3)))
    (gradient,) = torch.autograd.grad(scores.sum(), identity)

    _, (a,), (g,) = capture(EagerProgram(module, device=CPU), inputs, "middle.identity")

    assert torch.equal(conv, a)
    assert torch.equal(gradient, g)


def test_a_later_tap_that_shares_its_callers_memory_changes_nothing() -> None:
    """Two taps, the second an identity in the graph of the first: outputs stay bit-equal, both gradients are right."""
    module = Net(IdentityThenInPlace()).eval()
    inputs = images()
    expected = EagerProgram(module, device=CPU).run(inputs)

    taken, (conv, identity), (g_conv, g_identity) = capture(
        EagerProgram(module, device=CPU), inputs, "conv", "middle.identity"
    )

    assert torch.equal(expected, taken.outputs)
    assert torch.equal(conv, identity)
    assert torch.equal(g_conv, g_identity)


def test_a_module_called_twice_has_two_places() -> None:
    """`relu#0` and `relu#1` differ; the bare name is the last call."""
    module = Net(Twice()).eval()
    inputs = images()
    first = module.conv(inputs).relu().detach().requires_grad_()
    last = (module.middle.conv(first) + first).relu()
    scores = module.head(last.mean((2, 3)))
    expected = torch.autograd.grad(scores.sum(), [first, last])

    taken, activations, gradients = capture(
        EagerProgram(module, device=CPU), inputs, "middle.relu#0", "middle.relu#1", "middle.relu"
    )

    assert torch.equal(first, activations[0])
    assert torch.equal(last, activations[1])
    assert torch.equal(expected[0], gradients[0])
    assert torch.equal(expected[1], gradients[1])
    assert activations[2] is activations[1]
    assert torch.equal(scores, taken.outputs)


def test_only_the_earliest_tap_is_a_leaf() -> None:
    """Nothing before it is differentiated; later ones stay in its graph."""
    _, (first, later), _ = capture(EagerProgram(Net(Twice()), device=CPU), images(), "conv", "middle")

    assert (True, False) == (first.is_leaf, later.is_leaf)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_outputs_of_a_layer_that_returns_several_are_tapped_by_key(kind: str) -> None:
    """The container keeps its type, so that the model does not notice; each output has its own gradient."""
    container, first, second = CONTAINERS[kind]
    module = Net(Joined(container, first, second)).eval()
    inputs = images()
    conv = module.conv(inputs).detach()
    low, high = (conv * 2).requires_grad_(), conv.sin().requires_grad_()
    scores = module.head((low * high.relu()).mean((2, 3)))
    expected = torch.autograd.grad(scores.sum(), [low, high])

    taken, activations, gradients = capture(
        EagerProgram(module, device=CPU), inputs, f"middle.split:{first}", f"middle.split:{second}"
    )

    assert torch.equal(scores, taken.outputs)
    for one, a, g, other in zip((low, high), activations, gradients, expected, strict=True):
        assert torch.equal(one, a)
        assert torch.equal(other, g)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        pytest.param("middle.split", Unsupported, "middle.split:0, middle.split:1", id="which of two"),
        pytest.param("middle.split:7", NotFound, "known: middle.split:0", id="no such output"),
        pytest.param("conv:0", NotFound, "write 'conv'", id="only one output"),
        pytest.param("conv#1", NotFound, "called 1 times: conv#0", id="no such call"),
        pytest.param("covn", NotFound, "near names: conv", id="misspelt"),
    ],
)
def test_a_name_that_is_no_place_is_refused_with_those_that_are(
    name: str, error: type[CamserveError], said: str
) -> None:
    """The message says what to write instead, and the model is left alone."""
    module = Net(Joined(lambda a, b: (a, b), 0, 1))

    with pytest.raises(error, match=said):
        EagerProgram(module, device=CPU).capture([TapName.parse(name)], images())

    assert is_untouched(module)


def test_a_module_under_two_paths_is_known_by_the_first() -> None:
    """Its calls cannot be told apart by path, so the second is refused rather than mistaken."""
    shared = nn.ReLU()
    program = EagerProgram(Net(nn.Sequential(shared, nn.Conv2d(4, 4, 1), shared)), device=CPU)

    with pytest.raises(Unsupported, match=r"the same module as 'middle\.0'"):
        program.capture([TapName.parse("middle.2")], images())
    assert ["middle.0", "middle.1", "middle.0", "middle"] == [call.path for call in program.calls()][1:5]


def test_calls_are_unknown_before_the_first_forward() -> None:
    """Python code tells what it calls only by running."""
    program = EagerProgram(Net(nn.ReLU()), device=CPU)

    with pytest.raises(Unavailable, match="run it once"):
        program.calls()
    program.run(images())

    assert [("conv", 0), ("middle", 0), ("head", 0)] == [(call.path, call.index) for call in program.calls()]


def test_an_exception_in_the_forward_leaves_no_hooks() -> None:
    """Neither in a run that lists calls, nor in a capture, nor in a front or a tail; afterwards everything works."""
    failing = Raises()
    module = Net(nn.Sequential(nn.ReLU(), failing))
    program = EagerProgram(module, device=CPU)
    failing.is_failing = True
    with pytest.raises(ValueError, match="fails"):
        program.run(images())
    assert is_untouched(module)
    failing.is_failing = False
    inputs = images()
    expected = program.run(inputs)
    cut = program.cut(TapName("conv"))
    late = program.cut(TapName("head"))
    activation, crossing = cut.front(inputs)
    failing.is_failing = True

    for attempt in (
        lambda: program.capture([TapName("conv")], inputs),
        lambda: late.front(inputs),
        lambda: cut.tail(activation, crossing),
    ):
        with pytest.raises(ValueError, match="fails"):
            attempt()
        assert is_untouched(module)
    failing.is_failing = False

    assert torch.equal(expected, program.run(inputs))


def test_inputs_and_weights_keep_their_bytes() -> None:
    """Even those of a model that normalises its input in place."""

    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(nn.ReLU(inplace=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.sub_(0.5))

    program = EagerProgram(Normalising(), device=CPU)
    inputs = images()
    kept, weights = inputs.clone(), program.digests().weights

    program.run(inputs)
    capture(program, inputs, "net.conv", "net.middle")
    activation, crossing = program.cut(TapName("net.conv")).front(inputs)
    program.cut(TapName("net.conv")).tail(activation, crossing)

    assert torch.equal(kept, inputs)
    assert weights == program.digests().weights
    assert is_untouched(program._module)


@pytest.mark.parametrize(
    ("middle", "name"),
    [
        pytest.param(lambda: nn.ReLU(inplace=True), "conv", id="in place after the tap"),
        pytest.param(lambda: nn.ReLU(inplace=True), "middle", id="in place at the tap"),
        pytest.param(IdentityThenInPlace, "middle.identity", id="identity"),
        pytest.param(Twice, "middle.relu#0", id="first call"),
        pytest.param(Twice, "middle.relu", id="last call"),
        pytest.param(lambda: Joined(Pair, 0, 1), "middle.split:1", id="one of two"),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), "middle", id="container"),
    ],
)
def test_front_then_tail_is_the_whole(middle: Callable[[], nn.Module], name: str) -> None:
    """Bit for bit, with the gradient of `capture`; another activation goes all the way through."""
    program = EagerProgram(Net(middle()), device=CPU)
    inputs = images()
    expected = program.run(inputs)
    _, (a,), (g,) = capture(program, inputs, name)

    cut = program.cut(TapName.parse(name))
    activation, crossing = cut.front(inputs)
    leaf = activation.clone().requires_grad_()
    outputs = cut.tail(leaf, crossing)
    (gradient,) = torch.autograd.grad(outputs.sum(), leaf)

    assert torch.equal(a, activation)
    assert not activation.requires_grad
    assert torch.equal(expected, outputs)
    assert torch.equal(g, gradient)
    assert torch.equal(activation, leaf)
    assert not torch.equal(expected, cut.tail(activation * 0, crossing))
    assert is_untouched(program._module)


def test_the_tail_does_not_call_what_the_front_remembers() -> None:
    """The convolution before the tap runs once, in the front."""
    ran = []
    module = Net(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    module.middle[0].register_forward_pre_hook(lambda *_: ran.append("middle.0"))

    class Counting(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            ran.append("counting")
            return super().forward(x)

    module.conv = Counting(3, 4, 3, padding=1)
    program = EagerProgram(module, device=CPU)
    program.run(images())
    cut = program.cut(TapName("middle"))
    activation, crossing = cut.front(images())
    ran.clear()

    cut.tail(activation, crossing)

    assert [] == [name for name in ran if name == "counting"]


def test_a_cut_follows_its_crossing_not_the_last_input() -> None:
    """Two fronts may be open at once."""
    program = EagerProgram(Net(Twice()), device=CPU)
    one, two = images(), images()
    program.run(one)
    cut = program.cut(TapName.parse("middle.relu#0"))
    first, second = cut.front(one), cut.front(two)

    assert torch.equal(program.run(one), cut.tail(*first))
    assert torch.equal(program.run(two), cut.tail(*second))


def test_an_in_place_layer_whose_result_is_thrown_away_is_tapped() -> None:
    """The caller reads on from the tensor it passed in, so that is where the tapped value must be, also at a later tap."""

    class Discarding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            self.relu(x)
            return x * 2

    module = Net(Discarding()).eval()
    inputs = images()
    relu = module.conv(inputs).relu().detach().requires_grad_()
    scores = module.head((relu * 2).mean((2, 3)))
    (gradient,) = torch.autograd.grad(scores.sum(), relu)

    for names in (("middle.relu",), ("conv", "middle.relu")):
        taken, activations, gradients = capture(EagerProgram(module, device=CPU), inputs, *names)

        assert torch.equal(scores, taken.outputs)
        assert torch.equal(relu, activations[-1])
        assert torch.equal(gradient, gradients[-1])


def test_a_tap_never_writes_to_the_models_own_memory() -> None:
    """An identity may be given a parameter; the tapped copy goes elsewhere."""

    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 4, 1, 1))
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.identity(self.token)

    module = Net(Token())
    program = EagerProgram(module, device=CPU)

    _, (a,), (g,) = capture(program, images(), "middle.identity")

    assert torch.equal(module.middle.token, a)
    assert g.any()
    assert module.middle.token.is_leaf
    assert not module.middle.token.requires_grad


def test_an_identity_over_one_of_several_views_is_tapped() -> None:
    """As a normalisation that is switched off, given the query of q, k, v: autograd lets nobody write to such a view."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            query, key = torch.stack([x, x.sin()]).unbind(0)
            return self.identity(query) * key

    module = Net(Attention())
    program = EagerProgram(module, device=CPU)
    inputs = images()
    expected = program.run(inputs)

    taken, (conv, query), (_, g) = capture(program, inputs, "conv", "middle.identity")

    assert torch.equal(expected, taken.outputs)
    assert torch.equal(conv, query)
    assert torch.equal(torch.autograd.grad(module.head((query * conv.sin()).mean((2, 3))).sum(), query)[0], g)

"""What a TorchScript program must get right, one small model per difficulty. `test_script_architectures.py` has the real ones."""
# The models are data: their class docstring, or the test, tells what they are.
# ruff: noqa: D101, D102

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from camserve.server.engine.program import Call, TapName
from camserve.server.engine.script import ScriptProgram, load_script
from camserve.server.engine.script_values import is_same
from camserve.server.errors import CamserveError, NotFound, Unsupported

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


def archived(module: torch.jit.ScriptModule) -> io.BytesIO:
    """The bytes of a saved archive."""
    stream = io.BytesIO()
    torch.jit.save(module, stream)
    stream.seek(0)
    return stream


def scripted(model: nn.Module, dtype: torch.dtype = torch.float32) -> ScriptProgram:
    """A program from a scripted, saved and loaded model."""
    return load_script(archived(torch.jit.script(model.eval())), device=CPU, dtype=dtype)


def traced(model: nn.Module, *inputs: Any) -> ScriptProgram:
    """A program from a traced, saved and loaded model."""
    return load_script(archived(torch.jit.trace(model.eval(), inputs)), device=CPU)


def hooked(
    model: nn.Module,
    layer: str,
    inputs: Tensor,
    *,
    call: int = -1,
    pick: Callable[[Any], Tensor] = lambda output: output,
) -> tuple[Any, Tensor, Tensor]:
    """(output, activation, gradient) of the eager model at one call of a layer that returns a tensor."""
    kept: list[Tensor] = []
    calls = 0
    wanted = call
    if wanted < 0:
        hooked_calls: list[int] = []
        handle = model.get_submodule(layer).register_forward_hook(lambda *_: hooked_calls.append(1))
        model(inputs.clone())
        handle.remove()
        wanted = len(hooked_calls) - 1

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls - 1 != wanted:
            return None
        kept.append(output.detach().clone().requires_grad_())
        return kept[0].clone()

    model.eval().requires_grad_(requires_grad=False)
    handle = model.get_submodule(layer).register_forward_hook(keep)
    output = model(inputs.clone())
    handle.remove()
    return output, kept[0].detach(), torch.autograd.grad(pick(output).square().sum(), kept[0])[0]


def captured(
    program: ScriptProgram, layer: str, *inputs: Any, pick: Callable[[Any], Tensor] = lambda output: output
) -> tuple[Any, Tensor, Tensor]:
    """(output, activation, gradient) of the program at one tap."""
    capture = program.capture([TapName.parse(layer)], *inputs)
    activation = capture.activations[TapName.parse(layer)]
    (gradient,) = torch.autograd.grad(pick(capture.outputs).square().sum(), activation)
    return capture.outputs, activation.detach(), gradient


def assert_same(expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Bit for bit."""
    assert [True] * len(expected) == [torch.equal(a, b) for a, b in zip(expected, got, strict=True)]


def refusal(error: type[CamserveError], program: ScriptProgram, layer: str, *inputs: Any) -> CamserveError:
    """The refusal of one tap."""
    with pytest.raises(error) as refused:
        program.capture([TapName.parse(layer)], *inputs)
    return refused.value


class InPlaceAfter(nn.Module):
    """A convolution whose output is overwritten twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += 0.5
        return self.relu(y).mean((2, 3))


@pytest.mark.parametrize("layer", ["conv", "relu"])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_in_place_operators_after_a_tap_do_not_reach_what_it_captured(layer: str, how: str) -> None:
    """The activation is the value the layer returned, though the model goes on to overwrite that memory."""
    model, x = InPlaceAfter().eval(), torch.randn(2, 3, 8, 8)
    program = scripted(model) if how == "script" else traced(model, x)

    assert_same(hooked(model, layer, x), captured(program, layer, x))


class IdentityThenInPlace(nn.Module):
    """Two identities whose output is their input's memory, overwritten right after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(self.drop(self.conv(x)))
        y.mul_(2.0).relu_()
        return y.mean((2, 3)).square()


@pytest.mark.parametrize("layer", ["conv", "drop", "same"])
def test_identity_layers_give_their_value_before_the_overwriting(layer: str) -> None:
    """Dropout and Identity return their input; its later overwriting is neither in A nor missing from g."""
    model, x = IdentityThenInPlace().eval(), torch.randn(2, 3, 8, 8)

    assert_same(hooked(model, layer, x), captured(scripted(model), layer, x))


class IdentityOfOverwritten(nn.Module):
    """The input of an identity is overwritten after its output was last used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.same(y) * 3.0
        y.add_(1.0)
        return (z * y).mean((2, 3))


def test_an_identity_whose_input_is_overwritten_later_keeps_its_value() -> None:
    """The capture has memory of its own when another name of the same memory is written."""
    model, x = IdentityOfOverwritten().eval(), torch.randn(2, 3, 8, 8)

    assert_same(hooked(model, "same", x), captured(scripted(model), "same", x))


class IdentityEntangled(IdentityOfOverwritten):
    """The identity's output is read after its input was overwritten, so the two names cannot be parted."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.same(y)
        y.add_(1.0)
        return (z * y).mean((2, 3))


def test_a_tap_that_would_change_the_model_is_refused() -> None:
    """Where a tap would part memory that the model shares on purpose, it is refused and the model still runs."""
    model, x = IdentityEntangled().eval(), torch.randn(2, 3, 8, 8)
    program = scripted(model)

    assert "shares memory" in refusal(Unsupported, program, "same", x).message
    assert_same([model(x)], [program.run(x)])
    with pytest.raises(Unsupported, match="shares memory"):
        program.cut(TapName.parse("same")).front(x)


class SharesUnannounced(nn.Module):
    """`type_as` returns its own input when there is nothing to convert, though its schema promises new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return self.drop(y).mean((2, 3)) + y.type_as(x).mul_(2.0).mean((2, 3))


def test_a_write_that_the_schemas_deny_is_noticed() -> None:
    """The tap is made again with copies of everything, and what it captured was not overwritten."""
    model, x = SharesUnannounced().eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model)
    both = [TapName.parse("first"), TapName.parse("second")]
    together = program.capture(both, x)

    assert_same(
        [model(x), model.first(x), model.second(model.first(x))],
        [together.outputs, *(together.activations[tap] for tap in both)],
    )
    for layer in ("first", "second"):
        assert_same(hooked(model, layer, x), captured(scripted(model), layer, x))


class WritesThroughDropout(nn.Module):
    """A dropout whose output is only written to: in eval mode that writes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.drop(y).mul_(2.0)
        return y.mean((2, 3))


def test_writes_through_a_dropout_are_kept() -> None:
    """No pass takes the write for one into a value that nobody reads."""
    model, x = WritesThroughDropout().eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model)

    assert_same([model(x)], [program.run(x)])
    assert_same(hooked(model, "conv", x), captured(program, "conv", x))


class OverwritesItsInput(nn.Module):
    """A model that normalises in place, and whose first layer is an identity on the caller's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(2.0)
        return self.conv(self.same(x)).mean((2, 3))


def test_the_callers_tensor_is_neither_changed_nor_made_to_require_grad() -> None:
    """The caller's input stays as it was, also when a tap sits on it."""
    model, x = OverwritesItsInput().eval(), torch.randn(2, 3, 8, 8)
    program, before = scripted(model), x.clone()
    expected = hooked(model, "same", x)
    got = captured(program, "same", x)

    assert_same(expected, got)
    assert_same([expected[0]], [program.run(x)])
    assert_same([before], [x])
    assert not x.requires_grad


class Switched(nn.Module):
    """Branches decided by a setting, by a lookup in a setting, and by the data."""

    def __init__(self, *, wide: bool) -> None:
        super().__init__()
        self.wide = wide
        self.names = {"neck": "out"}
        self.stem = nn.Conv2d(3, 4, 1)
        self.neck = nn.Conv2d(4, 4, 1)
        self.bright = nn.Conv2d(4, 4, 1)
        self.dark = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.wide and "neck" in self.names:
            x = self.neck(x)
        if x.sum() > 0:  # noqa: SIM108 - a statement on purpose
            x = self.bright(x).relu_()
        else:
            x = self.dark(x)
        return x.mean((2, 3))


def test_branches_decided_by_settings_are_gone() -> None:
    """Only the branch that the archive's own settings take is listed, and it is tapped and cut like any layer."""
    x = torch.randn(2, 3, 4, 4)
    wide, narrow = Switched(wide=True).eval(), Switched(wide=False).eval()

    assert ["stem", "neck", "bright", "dark"] == [call.path for call in scripted(wide).calls()]
    assert ["stem", "bright", "dark"] == [call.path for call in scripted(narrow).calls()]
    assert_same(hooked(wide, "neck", x), captured(scripted(wide), "neck", x))


@pytest.mark.parametrize(("sign", "taken", "other"), [(1.0, "bright", "dark"), (-1.0, "dark", "bright")])
def test_a_layer_in_a_branch_is_tapped_when_the_input_takes_it(sign: float, taken: str, other: str) -> None:
    """A data-dependent branch can be tapped; an input that takes the other one is told so; neither can be cut."""
    model, x = Switched(wide=False).eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        model.stem.weight.zero_()
        model.stem.bias.fill_(sign)
    program = scripted(model)

    assert_same(hooked(model, taken, x), captured(program, taken, x))
    assert "branch" in refusal(Unsupported, program, other, x).message
    with pytest.raises(Unsupported, match="is in a branch that depends on the input"):
        program.cut(TapName.parse(taken))


class Looped(nn.Module):
    """A loop of fixed length and one whose length the input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Conv2d(3, 3, 1)
        self.free = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.fixed(x).relu_()
        for _ in range(x.size(0)):
            x = self.free(x)
        return x.mean((2, 3))


def test_loops_of_fixed_length_are_unrolled_and_others_refused() -> None:
    """Each round of a fixed loop is a call of its own; rounds of a free one cannot be told apart."""
    model, x = Looped().eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model)

    assert [("fixed", 0), ("fixed", 1), ("fixed", 2), ("free", 0)] == [(c.path, c.index) for c in program.calls()]
    assert_same(hooked(model, "fixed", x, call=1), captured(program, "fixed#1", x))
    assert "loop" in refusal(Unsupported, program, "free", x).message
    assert_same([model(x)], [program.run(x)])


class Twice(nn.Module):
    """One module called twice, and modules in lists, two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.relu(block(x))
        return x.mean((2, 3))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_calls_are_listed_in_order_with_whole_paths(how: str) -> None:
    """Children come before their container, a second call has index 1, and lists keep their name in the path."""
    model, x = Twice().eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model) if how == "script" else traced(model, x)

    expected = ["blocks.0.0", "blocks.0.1", "blocks.0", "relu", "blocks.1.0", "blocks.1.1", "blocks.1", "relu"]
    assert [Call(path=path, index=int(i == 7)) for i, path in enumerate(expected)] == list(program.calls())


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize(("layer", "call"), [("relu#0", 0), ("relu#1", 1), ("relu", 1)])
def test_a_call_index_names_one_call_and_the_bare_name_the_last(how: str, layer: str, call: int) -> None:
    """`relu#0` is the first call, `relu` the last."""
    model, x = Twice().eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model) if how == "script" else traced(model, x)

    assert_same(hooked(model, "relu", x, call=call), captured(program, layer, x))


def test_several_taps_are_captured_in_one_forward() -> None:
    """The earliest tap is a leaf, later ones stay in its graph, and each has the gradient it has alone."""
    program, x = scripted(Twice()), torch.randn(2, 3, 4, 4)
    taps = [TapName.parse(name) for name in ("relu", "blocks.0.1", "relu#0", "blocks.0", "blocks.0.0")]
    capture = program.capture(taps, x)
    activations = [capture.activations[tap] for tap in taps]
    gradients = torch.autograd.grad(capture.outputs.square().sum(), activations)

    assert [False, False, False, False, True] == [activation.is_leaf for activation in activations]
    for tap, activation, gradient in zip(taps, activations, gradients, strict=True):
        assert_same(captured(program, str(tap), x), [capture.outputs, activation, gradient])


def test_no_taps_is_a_forward() -> None:
    """A capture of nothing gives the outputs alone."""
    program, x = scripted(Twice()), torch.randn(2, 3, 4, 4)
    capture = program.capture([], x)

    assert {} == capture.activations
    assert_same([program.run(x)], [capture.outputs])


class Shared(nn.Module):
    """One module under two names, and a helper method that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = self.first
        self.inner = Twice()

    def helped(self, x: Tensor) -> Tensor:
        return self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.helped(self.first(x).relu()).relu())


def test_helper_methods_and_shared_modules_are_seen_through() -> None:
    """Calls made by a helper method are listed under the name used there; a shared module under each of its names."""
    model, x = Shared().eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model)
    paths = [call.path for call in program.calls()]

    assert ["first", "second", "inner.blocks.0.0"] == paths[:3]
    assert_same(hooked(model, "first", x, call=1), captured(program, "second", x))
    assert_same(hooked(model, "inner.blocks.1.0", x), captured(program, "inner.blocks.1.0", x))


class Encoder(nn.Module):
    """A module used by a method that is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x


class CallsEncode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.encode(x).mean((2, 3))


def test_layers_inside_other_methods_are_tapped_and_uncalled_ones_refused() -> None:
    """Children called by `encode` are listed; a module whose forward never runs says so."""
    model, x = CallsEncode().eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model)

    assert ["encoder.conv"] == [call.path for call in program.calls()]
    assert_same(hooked(model, "encoder.conv", x), captured(program, "encoder.conv", x))
    assert "never calls it" in refusal(Unsupported, program, "unused", x).message


class Levels(NamedTuple):
    """Two levels of features."""

    fine: Tensor
    coarse: Tensor


class Several(nn.Module):
    """Returns its features in the container it is told to."""

    def __init__(self, container: str) -> None:
        super().__init__()
        self.container = container
        self.fine = nn.Conv2d(3, 4, 1)
        self.coarse = nn.Conv2d(4, 4, 2, stride=2)


class SeveralTuple(Several):
    def forward(self, x: Tensor) -> tuple[Tensor, int, Tensor]:
        fine = self.fine(x)
        return fine, 7, self.coarse(fine)


class SeveralNamed(Several):
    def forward(self, x: Tensor) -> Levels:
        fine = self.fine(x)
        return Levels(fine, self.coarse(fine))


class SeveralList(Several):
    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        return [fine, self.coarse(fine)]


class SeveralDict(Several):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = OrderedDict()
        fine = self.fine(x)
        features["fine"] = fine
        features["coarse"] = self.coarse(fine)
        return features


class UsesTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fpn = SeveralTuple("tuple")

    def forward(self, x: Tensor) -> Tensor:
        fine, factor, coarse = self.fpn(x)
        return fine.relu_().mean((2, 3)) * factor + coarse.mean((2, 3))


class UsesNamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fpn = SeveralNamed("named")

    def forward(self, x: Tensor) -> Tensor:
        levels = self.fpn(x)
        return levels.fine.relu_().mean((2, 3)) + levels.coarse.mean((2, 3))


class UsesList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fpn = SeveralList("list")

    def forward(self, x: Tensor) -> Tensor:
        levels = self.fpn(x)
        return levels[0].relu_().mean((2, 3)) + levels[1].mean((2, 3))


class UsesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fpn = SeveralDict("dict")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = self.fpn(x)
        return {"out": levels["fine"].relu_().mean((2, 3)) + levels["coarse"].mean((2, 3))}


SEVERAL = [
    (UsesTuple, ("0", "2")),
    (UsesNamed, ("0", "1")),
    (UsesList, ("0", "1")),
    (UsesDict, ("fine", "coarse")),
]


def _answer(output: Any) -> Tensor:
    return output["out"] if isinstance(output, dict) else output


@pytest.mark.parametrize(("model_class", "keys"), SEVERAL)
def test_one_output_of_a_layer_that_returns_several_is_tapped(model_class: type, keys: tuple[str, str]) -> None:
    """`fpn:0` and `fpn:fine` have the value and gradient of the layer that made that output."""
    model, x = model_class().eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model)
    fine = captured(program, f"fpn:{keys[0]}", x, pick=_answer)
    expected = hooked(model, "fpn.coarse", x, pick=_answer)
    coarse = captured(program, f"fpn:{keys[1]}", x, pick=_answer)
    both = program.capture([TapName.parse(f"fpn:{key}") for key in keys], x)
    gradients = torch.autograd.grad(_answer(both.outputs).square().sum(), list(both.activations.values()))

    assert keys == next(call.outputs for call in program.calls() if call.path == "fpn")
    assert_same([_answer(expected[0]), *expected[1:]], [_answer(coarse[0]), *coarse[1:]])
    assert_same([model.fpn.fine(x).detach()], [fine[1]])
    assert_same([fine[2], coarse[2]], gradients)


@pytest.mark.parametrize(("model_class", "keys"), SEVERAL)
def test_the_bare_name_of_a_layer_that_returns_several_is_refused_with_the_names(
    model_class: type, keys: tuple[str, str]
) -> None:
    """The message lists what to write; an unknown key is not found."""
    program, x = scripted(model_class()), torch.randn(2, 3, 4, 4)

    assert f"fpn:{keys[0]}, fpn:{keys[1]}" in refusal(Unsupported, program, "fpn", x).message
    assert f"fpn:{keys[0]}" in refusal(NotFound, program, "fpn:9", x).message
    assert "write 'fpn.fine'" in refusal(NotFound, program, "fpn.fine:0", x).message


@pytest.mark.parametrize("model_class", [SeveralTuple, SeveralNamed, SeveralList, SeveralDict])
def test_models_return_their_own_structure(model_class: type) -> None:
    """Tuples, named tuples, lists and dicts come back as such from run, capture and cut."""
    model, x = model_class("any").eval(), torch.randn(2, 3, 4, 4)
    program = scripted(model)
    cut = program.cut(TapName.parse("fine"))
    expected = model(x)

    for output in (
        program.run(x),
        program.capture([TapName.parse("fine")], x).outputs,
        cut.tail(*cut.front(x)),
    ):
        assert is_same(expected, output)
        assert getattr(expected, "_fields", None) == getattr(output, "_fields", None)
        assert isinstance(output, (dict, list, tuple))
        assert isinstance(expected, dict) == isinstance(output, dict)
        assert isinstance(expected, list) == isinstance(output, list)

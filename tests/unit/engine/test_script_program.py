"""How a TorchScript program behaves around its forwards: archives of every sort, what it refuses, what it leaves untouched."""
# The models are data: their class docstring, or the test, tells what they are.
# ruff: noqa: D101, D102

import io
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from camserve.server.engine.program import ProgramKind, TapName
from camserve.server.engine.script import ScriptProgram, load_script
from camserve.server.errors import NotFound, Reason, Unsupported

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small convolutions on two threads of a busy machine wait more than they compute."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """Two stages with batch norm, an in-place skip and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x)
        y += x
        return self.head(functional.relu(y, inplace=True).mean((2, 3)))


def archived(module: Any) -> io.BytesIO:
    """The bytes of a saved archive."""
    stream = io.BytesIO()
    torch.jit.save(module, stream)
    stream.seek(0)
    return stream


def small(dtype: torch.dtype = torch.float32) -> ScriptProgram:
    """The small model, scripted."""
    return load_script(archived(torch.jit.script(Small().eval())), device=CPU, dtype=dtype)


def gradient_at(program: ScriptProgram, layer: str, *inputs: Any) -> tuple[Tensor, Tensor]:
    """(activation, gradient of the summed first logit)."""
    tap = TapName.parse(layer)
    capture = program.capture([tap], *inputs)
    return capture.activations[tap], torch.autograd.grad(capture.outputs[:, 0].sum(), capture.activations[tap])[0]


def test_a_program_says_what_it_is(tmp_path: Path) -> None:
    """Kind, device, dtype and tensor names are told; a path is as good as a stream."""
    torch.jit.script(Small().eval()).save(str(tmp_path / "model.pt"))
    program = load_script(tmp_path / "model.pt", device=CPU)

    assert (ProgramKind.TORCHSCRIPT, CPU, torch.float32) == (program.kind, program.device, program.dtype)
    assert set(Small().state_dict()) == set(program.tensors())


def test_run_is_the_archives_own_output_for_every_batch_size_and_call() -> None:
    """Bit for bit, first call or fourth, whatever the batch size before."""
    stream = archived(torch.jit.script(Small().eval()))
    program, archive = load_script(stream, device=CPU), torch.jit.load((stream.seek(0), stream)[1]).eval()
    batches = [torch.randn(size, 3, 8, 8) for size in (1, 2, 3, 8) * 4]

    with torch.no_grad():
        assert [True] * 16 == [torch.equal(archive(batch), program.run(batch)) for batch in batches]


def test_captures_do_not_change_with_repetition_or_other_batch_sizes() -> None:
    """No call re-optimises: the fifth capture is the first bit for bit, with other sizes and layers in between."""
    program, x = small(), torch.randn(3, 3, 8, 8)
    first = gradient_at(program, "block", x)
    for size in (1, 2, 8, 3, 3):
        gradient_at(program, "stem.1", torch.randn(size, 3, 8, 8))
        again = gradient_at(program, "block", x)

        assert [True, True] == [torch.equal(a, b) for a, b in zip(first, again, strict=True)]


def test_nothing_before_the_tap_has_a_graph_and_no_parameter_a_gradient() -> None:
    """The tap is a leaf, parameters are frozen and `.grad` stays empty."""
    program = small()
    activation, _ = gradient_at(program, "block.0", torch.randn(2, 3, 8, 8))

    assert activation.is_leaf
    assert activation.requires_grad
    assert activation.grad is None
    assert {(False, None)} == {(tensor.requires_grad, tensor.grad) for tensor in program.tensors().values()}
    assert not program.run(torch.randn(2, 3, 8, 8)).requires_grad


def test_tensors_and_digests_survive_captures_cuts_and_failures() -> None:
    """A forward that raises leaves the program usable and every byte as it was."""
    program, x = small(), torch.randn(2, 3, 8, 8)
    before, expected = program.digests(), gradient_at(program, "block", x)
    cut = program.cut(TapName.parse("stem"))
    cut.tail(*cut.front(x))
    for wrong in (torch.randn(2, 4, 8, 8), torch.randn(3, 8), torch.randn(2, 3, 8, 8).long()):
        with pytest.raises(RuntimeError):
            program.capture([TapName.parse("block")], wrong)
        with pytest.raises(RuntimeError):
            program.run(wrong)

    assert before == program.digests()
    assert [True, True] == [torch.equal(a, b) for a, b in zip(expected, gradient_at(program, "block", x), strict=True)]


def test_digests_name_weights_and_code_apart() -> None:
    """Loading twice gives the same digests; other weights change one of them, other code the other."""
    stream = archived(torch.jit.script(Small().eval()))
    first, again = (
        load_script(stream, device=CPU).digests(),
        load_script((stream.seek(0), stream)[1], device=CPU).digests(),
    )
    torch.manual_seed(1)
    other = small().digests()

    assert first == again
    assert first.code == other.code
    assert first.weights != other.weights


@pytest.mark.parametrize("layer", ["stem.0", "stem.1", "stem", "block", "head"])
def test_front_and_tail_are_the_program_and_change_neither_argument(layer: str) -> None:
    """The tail can be run again and again on the same values, and on changed activations."""
    program, x = small(), torch.randn(2, 3, 8, 8)
    cut = program.cut(TapName.parse(layer))
    activation, crossing = cut.front(x)
    kept, kept_crossing = activation.clone(), [value.clone() for value in crossing.values]

    assert [True] * 3 == [torch.equal(program.run(x), cut.tail(activation, crossing)) for _ in range(3)]
    assert torch.equal(gradient_at(program, layer, x)[0], activation)
    assert torch.equal(kept, activation)
    assert [True] * len(kept_crossing) == [
        torch.equal(a, b) for a, b in zip(kept_crossing, crossing.values, strict=True)
    ]
    assert not torch.equal(program.run(x), cut.tail(activation + 1.0, crossing))


def test_the_tail_is_differentiable_where_grad_is_enabled() -> None:
    """A gradient through the tail alone is the gradient at the tap."""
    program, x = small(), torch.randn(2, 3, 8, 8)
    activation, crossing = program.cut(TapName.parse("block")).front(x)
    leaf = activation.clone().requires_grad_()
    outputs = program.cut(TapName.parse("block")).tail(leaf, crossing)

    assert torch.equal(gradient_at(program, "block", x)[1], torch.autograd.grad(outputs[:, 0].sum(), leaf)[0])


def test_another_thread_than_the_loading_one_may_run_it_and_keeps_its_own_executor_mode() -> None:
    """The executor switch is the calling thread's, set only while a function runs."""
    program, x = small(), torch.randn(2, 3, 8, 8)
    found: list[Any] = []

    def work() -> None:
        found.extend([gradient_at(program, "block", x)[1], torch._C._get_graph_executor_optimize()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert torch.equal(gradient_at(program, "block", x)[1], found[0])
    assert found[1]
    assert torch._C._get_graph_executor_optimize()


def test_functions_are_kept_per_set_of_taps_and_their_number_is_bounded() -> None:
    """The order of taps does not matter, and the least recently used one makes room."""
    program, x = small(), torch.randn(1, 3, 8, 8)
    layers = ["stem.0", "stem.1", "stem.2", "stem", "block.0", "block.1", "block"]
    for first in layers:
        for second in layers:
            program.capture([TapName.parse(first), TapName.parse(second)], x)

    assert 28 == len(program._plain._tapped)


def test_unknown_layers_get_near_names_and_a_capped_list() -> None:
    """The message helps to find the layer; call indices beyond the last are not found."""
    program, x = small(), torch.randn(1, 3, 8, 8)
    with pytest.raises(NotFound, match=r"near names: .*block.*layers that can be tapped: stem, block, head") as refused:
        program.capture([TapName.parse("blok")], x)
    with pytest.raises(NotFound, match=r"'block' is called 1 times: block#0"):
        program.capture([TapName.parse("block#1")], x)

    assert Reason.LAYER_NOT_FOUND == refused.value.reason


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    """A missing file is not found; other bytes are no archive."""
    with pytest.raises(NotFound, match="no file"):
        load_script(tmp_path / "missing.pt", device=CPU)
    with pytest.raises(Unsupported, match="not a TorchScript archive"):
        load_script(io.BytesIO(b"no archive"), device=CPU)


def test_a_frozen_archive_offers_operators() -> None:
    """Freezing loses module paths; `op.conv2d#0` has the value and gradient of the layer it came from."""
    model, x = Small().eval(), torch.randn(2, 3, 8, 8)
    # Without numerics the convolutions stay apart from their batch norm, so that both archives compute the same.
    frozen = torch.jit.freeze(torch.jit.script(model), optimize_numerics=False)
    whole = load_script(archived(torch.jit.script(model)), device=CPU)
    program = load_script(archived(frozen), device=CPU)

    assert ["conv2d", "batch_norm", "relu", "conv2d", "batch_norm", "add", "relu", "mean", "linear"] == [
        call.path.removeprefix("op.") for call in program.calls()
    ]
    assert [True, True] == [
        torch.equal(a, b)
        for a, b in zip(gradient_at(whole, "block.0", x), gradient_at(program, "op.conv2d", x), strict=True)
    ]
    assert torch.equal(gradient_at(whole, "stem.0", x)[0], gradient_at(program, "op.conv2d#0", x)[0])
    assert torch.equal(gradient_at(whole, "stem", x)[1], gradient_at(program, "op.relu#0", x)[1])
    cut = program.cut(TapName.parse("op.relu#0"))
    assert torch.equal(whole.run(x), cut.tail(*cut.front(x)))


def test_a_frozen_archive_has_digests_of_its_constants() -> None:
    """Weights that became constants are tensors with names, and count in the digest."""
    programs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        programs.append(load_script(archived(torch.jit.freeze(torch.jit.script(Small().eval()))), device=CPU))

    assert "constant.0" in programs[0].tensors()
    assert programs[0].digests() == programs[1].digests()
    assert programs[0].digests().weights != programs[2].digests().weights


class StaticBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.arange(2.0).view(2, 1, 1, 1)).relu().mean((2, 3))


class OfStatic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = StaticBatch()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).reshape(2, 3)


def test_a_trace_with_a_baked_in_batch_runs_at_that_batch() -> None:
    """Its own size works, another one raises what torch raises, and its own size works again."""
    x = torch.randn(2, 3, 4, 4)
    program = load_script(archived(torch.jit.trace(OfStatic(), x)), device=CPU)

    assert torch.equal(OfStatic()(x), program.run(x))
    with pytest.raises(RuntimeError):
        program.capture([TapName.parse("inner")], torch.randn(3, 3, 4, 4))
    assert torch.equal(OfStatic()(x), program.capture([TapName.parse("inner")], x).outputs)


def test_float64_converts_weights_and_traced_constants() -> None:
    """A double program computes in double all the way, from scripted, traced and frozen archives."""
    model, x = Small().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    traced = torch.jit.trace(OfStatic(), x.float()[:, :, :4, :4])
    frozen = torch.jit.freeze(torch.jit.script(model), optimize_numerics=False)
    expected = load_script(archived(torch.jit.script(model)), device=CPU, dtype=torch.float64).run(x)

    assert torch.equal(model.double()(x), expected)
    assert torch.equal(expected, load_script(archived(frozen), device=CPU, dtype=torch.float64).run(x))
    assert torch.float64 == load_script(archived(traced), device=CPU, dtype=torch.float64).run(x[:, :, :4, :4]).dtype


class FixedDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(torch.float32)).mean((2, 3))


def test_a_dtype_fixed_in_the_code_is_refused_with_the_reason() -> None:
    """An archive that casts to float32 cannot be made a float64 program."""
    program = load_script(archived(torch.jit.script(FixedDtype().eval())), device=CPU, dtype=torch.float64)

    with pytest.raises(Unsupported, match=r"dtypes fixed in its code and cannot compute in torch\.float64"):
        program.run(torch.randn(1, 3, 2, 2, dtype=torch.float64))


class ListInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images: list[Tensor], scale: float = 2.0) -> Tensor:
        return self.conv(torch.stack(images)).mean((2, 3)) * scale


def test_a_model_of_lists_takes_tensors_and_missing_arguments_their_defaults() -> None:
    """Several tensors, one batch and a list are all the same list of images."""
    model, x = ListInput().eval(), torch.randn(2, 3, 4, 4)
    program = load_script(archived(torch.jit.script(model)), device=CPU)
    expected = model(list(x))

    assert torch.equal(expected, program.run(x))
    assert torch.equal(expected, program.run(x[0], x[1]))
    assert torch.equal(expected, program.run(list(x)))  # type: ignore[arg-type]
    assert torch.equal(model.conv(x), gradient_at(program, "conv", x)[0])


class Untappable(nn.Module):
    """Layers that return integers, a number and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.best = Best()
        self.count = Count()
        self.check = Check()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        y = self.conv(x)
        return y.mean((2, 3)) * self.count(x) + self.best(y).float().mean()


class Best(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Count(nn.Module):
    def forward(self, x: Tensor) -> int:
        return x.size(0)


class Check(nn.Module):
    def forward(self, x: Tensor) -> None:
        assert x.dim() == 4


def test_layers_without_a_differentiable_tensor_are_listed_and_refused() -> None:
    """Such calls are in the list with the reason; integers are refused when they are met."""
    program, x = load_script(archived(torch.jit.script(Untappable().eval())), device=CPU), torch.randn(1, 3, 2, 2)

    assert [("check", True), ("conv", False), ("count", True), ("best", False)] == [
        (call.path, bool(call.refusal)) for call in program.calls()
    ]
    for layer in ("check", "count", "best"):
        with pytest.raises(Unsupported):
            program.capture([TapName.parse(layer)], x)
    gradient_at(program, "conv", x)


class Strange:
    """What a pickle can do: call anything when it is read."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("entry", ["", "data.pkl", "constants.pkl"])
def test_pickles_are_never_run(tmp_path: Path, entry: str) -> None:
    """Neither a raw pickle in place of an archive nor one inside it: TorchScript's own reader knows no Python functions."""
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    strange = pickle.dumps(Strange(trace), protocol=2)
    if entry:
        with zipfile.ZipFile(archived(torch.jit.script(Small().eval()))) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, strange if name.endswith(f"/{entry}") else old.read(name))
    else:
        path.write_bytes(strange)

    with pytest.raises(Unsupported, match="not a TorchScript archive"):
        load_script(path, device=CPU)
    assert not trace.exists()


def test_a_module_saved_whole_is_not_read(tmp_path: Path) -> None:
    """What `torch.save` makes of a Python object is refused, and what it would run does not."""
    torch.save(Strange(tmp_path / "trace"), tmp_path / "model.pt")

    with pytest.raises(Unsupported, match="not a TorchScript archive"):
        load_script(tmp_path / "model.pt", device=CPU)
    assert not (tmp_path / "trace").exists()


class Saves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "trace")
        return x


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_file("trace", shared=False, size=3, dtype=torch.uint8)


class SavesWhenLoaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]
        torch.save(state[0], "trace")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("kind", [Saves, Reads, SavesWhenLoaded])
def test_a_model_does_not_reach_for_files(
    kind: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchScript has operators for that, and would run some of them while it loads."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(Unsupported, match=r"calls (save|from_file), which reaches outside of the model"):
        load_script(archived(torch.jit.script(kind())), device=CPU)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spelled",
    [
        "t = torch\n    t.save(x, 'trace')",
        "getattr(torch, 'save')(x, 'trace')",
        "ops.aten.save(x, 'trace')",
        "torch . save (x, 'trace')",
        "torch.sa\\\n    ve(x, 'trace')",
    ],
)
def test_another_spelling_changes_nothing(spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in the archive's code is not understood by torch, or seen before it can run."""
    monkeypatch.chdir(tmp_path)
    old = zipfile.ZipFile(archived(torch.jit.script(Saves())))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            entry = old.read(name)
            if name.endswith("__torch__.py"):
                entry = entry.replace(b'torch.save(x, "trace")', spelled.encode())
                assert spelled.encode() in entry
            new.writestr(name, entry)
    stream.seek(0)

    with pytest.raises(Unsupported):
        load_script(stream, device=CPU)
    assert [] == list(tmp_path.iterdir())


def test_a_layer_may_be_called_save() -> None:
    """It is the operator that is refused, not the word."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.save = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.save(x).mean((2, 3))

    program = load_script(archived(torch.jit.script(Keeps())), device=CPU)

    assert (2, 4) == program.run(torch.randn(2, 3, 4, 4)).shape

import functools
import io
import json
import re
import zipfile
from collections.abc import Callable
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


@functools.cache
def archive_of_net() -> bytes:
    """One archive for all that is only refused."""
    return archived(Net(), torch.randn(2, 3, 6, 6)).getvalue()


class Strange:
    """What a pickle can do: call anything when it is read."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._trace,)


def edited(archive: io.BytesIO, edits: dict[str, Callable[[bytes], bytes]]) -> io.BytesIO:
    """The archive with some entries changed, or added where there are none."""
    stream = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(stream, "w") as new:
        (root,) = {name.partition("/")[0] for name in old.namelist()}
        known = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name in {**known, **edits}:
            new.writestr(f"{root}/{name}", edits.get(name, bytes)(known.get(name, b"")))
    stream.seek(0)
    return stream


def pickled(value: object) -> Callable[[bytes], bytes]:
    """An edit that puts a pickle in an entry's place."""

    def edit(_entry: bytes) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()

    return edit


def table(**payload: object) -> Callable[[bytes], bytes]:
    """An edit that lists one more payload among an archive's tensors."""

    def edit(entry: bytes) -> bytes:
        return json.dumps({"config": json.loads(entry)["config"] | {"more": payload}}).encode()

    return edit


@pytest.mark.parametrize(
    "place",
    [
        "sample inputs",
        "weights",
        "old weights",
        "constants",
        "old constants",
        "objects",
        "opaque objects",
        "size",
        "name",
    ],
)
@pytest.mark.parametrize("is_file", [False, True], ids=["stream", "file"])
def test_an_archive_that_would_run_code_is_refused(
    tmp_path: Path,
    place: str,
    is_file: bool,  # noqa: FBT001 - a test parameter
) -> None:
    """Wherever in the archive it hides, and before any of it has run."""
    trace = tmp_path / "trace"
    strange = pickled(Strange(trace))
    payload = {"is_param": False, "use_pickle": True, "tensor_meta": None}
    call = f"[Integer(2), __import__('pathlib').Path({str(trace)!r}).touch()][0]"
    edits: dict[str, dict[str, Callable[[bytes], bytes]]] = {
        "sample inputs": {"data/sample_inputs/model.pt": strange},
        "weights": {
            "data/weights/model_weights_config.json": table(path_name="more", **payload),
            "data/weights/more": strange,
        },
        "old weights": {"data/weights/model.pt": strange},
        "constants": {
            "data/constants/model_constants_config.json": table(path_name="tensor_9", **payload),
            "data/constants/tensor_9": strange,
        },
        "old constants": {"data/constants/model.pt": strange},
        "objects": {
            "data/constants/model_constants_config.json": table(path_name="custom_obj_9", **payload),
            "data/constants/custom_obj_9": strange,
        },
        "opaque objects": {
            "data/constants/model_constants_config.json": table(path_name="opaque_obj_9", **payload),
            "data/constants/opaque_obj_9": strange,
        },
        "size": {"models/model.json": lambda entry: _with_sizes(entry, call)},
        "name": {"models/model.json": lambda entry: entry.replace(b'"name": "images"', b'"name": "images, x=print()"')},
    }
    archive: io.BytesIO | Path = edited(io.BytesIO(archive_of_net()), edits[place])
    if is_file and isinstance(archive, io.BytesIO):
        (tmp_path / "net.pt2").write_bytes(archive.getvalue())
        archive = tmp_path / "net.pt2"

    with pytest.raises(Unsupported, match="run code when read; re-export with tensors only"):
        load_export(archive, device=CPU)
    assert not trace.exists()


def _with_sizes(entry: bytes, text: str) -> bytes:
    """A graph in which every size is this text."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: text if key == "expr_str" else changed(below) for key, below in value.items()}
        return [changed(below) for below in value] if isinstance(value, list) else value

    return json.dumps(changed(json.loads(entry))).encode()


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("torch.os.system", "calls 'torch.os.system', which is no operator"),
        ("torch.hub.load", "which is no operator"),
        ("torch.ops.load_library", "which is no operator"),
        ("torch.ops.load_library.__self__.load_library", "which is no operator"),
        ("torch.ops.aten.relu.__class__", "which is no operator"),
        ("_operator.attrgetter", "which is no operator"),
        ("builtins.eval", "which is no operator"),
        ("torch.ops.aten.from_file.default", "reaches outside of the model"),
        ("torch.ops.aten.save.default", "reaches outside of the model"),
        ("torch.ops.debugprims.load_tensor.default", "reaches outside of the model"),
    ],
)
def test_a_graph_calls_nothing_but_operators_of_the_model(target: str, told: str) -> None:
    """What torch has imported lies below it by name; what reads and writes files is an operator, and no part of a model."""

    def changed(entry: bytes) -> bytes:
        graph = json.loads(entry)
        graph["graph_module"]["graph"]["nodes"][0]["target"] = target
        return json.dumps(graph).encode()

    with pytest.raises(Unsupported, match=re.escape(told)):
        load_export(edited(io.BytesIO(archive_of_net()), {"models/model.json": changed}), device=CPU)


def test_compiled_code_is_refused() -> None:
    """PyTorch would load the library, which runs it, although nothing here asks for it."""
    archive = edited(io.BytesIO(archive_of_net()), {"data/aotinductor/model/a.so": lambda _: b"library"})

    with pytest.raises(Unsupported, match="compiled libraries"):
        load_export(archive, device=CPU)


def test_an_archive_of_an_old_version_is_looked_through_too(tmp_path: Path) -> None:
    """PyTorch still reads the layout of 2.7, whose pickles have other names."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", pickled(Strange(tmp_path / "trace"))(b""))
    stream.seek(0)

    with pytest.raises(Unsupported, match=r"serialized_state_dict\.pt.* holds pickled Python objects"):
        load_export(stream, device=CPU)
    assert not (tmp_path / "trace").exists()


def test_an_archive_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    """By its table of contents, before anything is unpacked."""
    path = tmp_path / "net.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/models/model.json", bytes(80 << 20))

    with pytest.raises(Unsupported, match="unpack to more"):
        load_export(path, device=CPU)


def test_sample_inputs_of_plain_values_pass() -> None:
    """Tensors, numbers, texts, None and containers of them run nothing."""
    values = ((torch.ones(2, 3, 6, 6),), {"scale": 2, "mode": "fast", "more": [1.5, None, {"b": True}]})
    archive = edited(io.BytesIO(archive_of_net()), {"data/sample_inputs/model.pt": pickled(values)})

    assert (2, 5) == load_export(archive, device=CPU).run(torch.randn(2, 3, 6, 6))["out"].shape


def test_sizes_that_are_computed_pass() -> None:
    """Expressions of sizes are what dynamic exports are made of."""

    class Resize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """To several sizes, ending in one number for each channel."""
            side = x.shape[2]
            x = nn.functional.interpolate(x, size=(side // 2 + 1, side * 3))
            x = nn.functional.interpolate(nn.functional.avg_pool2d(x, 3, 2), scale_factor=1.7)
            return x.mean((2, 3)) * (side / 3)

    stream = io.BytesIO()
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(Resize(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=(sizes,))
    torch.export.save(exported, stream)
    stream.seek(0)
    inputs = torch.randn(3, 3, 20, 12)

    assert torch.equal(Resize()(inputs), load_export(stream, device=CPU).run(inputs))

"""Four ways to load one network agree bit for bit with a plain forward hook on the network itself."""

import copy
import dataclasses
import gc
import io
from collections.abc import Iterator, Mapping

import pytest
import torch
import torchvision
from torch import Tensor, nn

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import load_export
from camserve.server.engine.program import Program, TapName
from camserve.server.engine.script import load_script

CPU = torch.device("cpu")

# From the first layers to the last stage. Containers, convolutions and in-place activations; `#0` where a layer is called twice.
LAYERS = {
    "resnet18": ("conv1", "layer1.0.relu#0", "layer2.0.downsample", "layer3.1.bn1", "layer4"),
    "mobilenet_v3_small": ("features.0.0", "features.3.block.1", "features.6.block.2.fc1", "features.9", "features.12"),
    "efficientnet_b0": ("features.0", "features.3.1.block.2", "features.5.0.block.1.0", "features.8.0", "features.8"),
    "densenet121": ("features.conv0", "features.denseblock1.denselayer3", "features.transition2", "features.norm5"),
    "convnext_tiny": ("features.0", "features.1.0.block.2", "features.3.1", "features.6", "features.7.2"),
}
KINDS = ("scripted", "traced", "exported", "eager")
HOOKED_KINDS = ("exported", "eager")  # TorchScript has tests of its own for what is parametrised with these.
SIZE = 96


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network and the programs made of it."""

    name: str
    network: nn.Module
    programs: Mapping[str, Program]


@dataclasses.dataclass(frozen=True)
class Pass:
    """Scores (b, classes), and activation and gradient by layer."""

    scores: Tensor
    activations: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small convolutions on two threads of a busy machine wait more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=LAYERS)
def loaded(request: pytest.FixtureRequest, _one_thread: None) -> Iterator[Loaded]:
    """One architecture, saved and loaded in every form; the next one is built after it is gone."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(request.param, weights=None).eval()
    _spread_statistics(network)
    images = torch.randn(2, 3, SIZE, SIZE)
    programs: dict[str, Program] = {}
    with torch.no_grad():
        programs["scripted"] = load_script(_saved(torch.jit.script(network)), device=CPU)
        programs["traced"] = load_script(_saved(torch.jit.trace(network, images)), device=CPU)
        archive = io.BytesIO()
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=(batch,)), archive)
    archive.seek(0)
    programs["exported"] = load_export(archive, device=CPU)
    programs["eager"] = EagerProgram(copy.deepcopy(network), device=CPU)
    yield Loaded(request.param, network, programs)
    gc.collect()


def _spread_statistics(network: nn.Module) -> None:
    """Gives batch norms unlike statistics, so that they are no identities as in a fresh network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)


def _saved(archive: torch.jit.ScriptModule) -> io.BytesIO:
    stream = io.BytesIO()
    torch.jit.save(archive, stream)
    stream.seek(0)
    return stream


def hooked_pass(network: nn.Module, layers: tuple[str, ...], images: Tensor) -> Pass:
    """What every program must reproduce: ordinary hooks on the ordinary network, all of it differentiated."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for layer in layers:
        path = layer.partition("#")[0]

        def hook(_module: nn.Module, _args: object, output: Tensor, path: str = path) -> Tensor:
            seen.setdefault(path, []).append(output)
            return output.clone()  # In-place layers further on would change what is kept.

        handles.append(network.get_submodule(path).register_forward_hook(hook))
    scores = network(images)
    for handle in handles:
        handle.remove()
    activations = {layer: seen[layer.partition("#")[0]][0 if "#" in layer else -1] for layer in layers}
    gradients = torch.autograd.grad(_target(scores), list(activations.values()))
    return Pass(scores, activations, dict(zip(activations, gradients, strict=True)))


def program_pass(program: Program, layers: tuple[str, ...], images: Tensor) -> Pass:
    """The same by `capture`."""
    capture = program.capture([TapName.parse(layer) for layer in layers], images)
    activations = {layer: capture.activations[TapName.parse(layer)] for layer in layers}
    gradients = torch.autograd.grad(_target(capture.outputs), list(activations.values()))
    return Pass(capture.outputs, activations, dict(zip(activations, gradients, strict=True)))


def _target(scores: Tensor) -> Tensor:
    """Each row's own class, summed."""
    return sum((row[7 * index] for index, row in enumerate(scores)), torch.zeros(()))


def _check_equal(expected: Pass, found: Pass, where: str) -> None:
    assert torch.equal(expected.scores, found.scores), f"scores of {where}"
    for layer in expected.activations:
        assert torch.equal(expected.activations[layer], found.activations[layer]), f"activation of {layer} {where}"
        assert torch.equal(expected.gradients[layer], found.gradients[layer]), f"gradient of {layer} {where}"
        assert expected.gradients[layer].any(), f"gradient of {layer} {where} is zero: nothing was compared"


def _check_all(loaded: Loaded, rows: int, size: int) -> None:
    layers = LAYERS[loaded.name]
    images = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(rows))
    together = hooked_pass(loaded.network, layers, images)
    with torch.no_grad():
        plain = loaded.network(images)
    for kind in KINDS:
        program = loaded.programs[kind]
        assert torch.equal(plain, program.run(images)), f"run of {kind}, {rows} rows"
        _check_equal(together, program_pass(program, layers, images), f"{kind}, {rows} rows")


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_every_kind_gives_the_same_bits(loaded: Loaded, rows: int) -> None:
    """Outputs, activations and gradients at several taps of one pass, all over the network."""
    _check_all(loaded, rows, SIZE)


class Small(nn.Module):
    """In-place activations, one of them called twice, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 10)."""
        first = self.relu(self.norm(self.stem(images)))
        first += 0.5
        scores: Tensor = self.head(self.relu(self.body(first) + first).mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def small(_one_thread: None) -> Mapping[str, Program]:
    """A small network in every form."""
    torch.manual_seed(0)
    network, images, archive = Small().eval(), torch.randn(2, 3, 8, 8), io.BytesIO()
    torch.export.save(torch.export.export(network, (images,)), archive)
    archive.seek(0)
    return {
        "scripted": load_script(_saved(torch.jit.script(network)), device=CPU),
        "traced": load_script(_saved(torch.jit.trace(network, images)), device=CPU),
        "exported": load_export(archive, device=CPU),
        "eager": EagerProgram(network, device=CPU),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [("stem",), ("relu#0",), ("stem", "norm", "relu#0", "body", "relu#1")])
def test_a_capture_without_gradients_has_the_same_bits(
    small: Mapping[str, Program], kind: str, layers: tuple[str, ...]
) -> None:
    """Only the graph is missing: no value and no output requires grad, also where the caller has gradients enabled."""
    taps, images = [TapName.parse(layer) for layer in layers], torch.randn(2, 3, 8, 8)
    expected = small[kind].capture(taps, images)

    found = small[kind].capture(taps, images, differentiable=False)

    assert expected.outputs.requires_grad
    assert not found.outputs.requires_grad
    assert torch.equal(expected.outputs, found.outputs)
    for tap in taps:
        assert expected.activations[tap].requires_grad, tap
        assert not found.activations[tap].requires_grad, tap
        assert torch.equal(expected.activations[tap], found.activations[tap]), tap


@pytest.mark.parametrize("kind", HOOKED_KINDS)
def test_a_tap_alone_gives_what_it_gives_in_company(loaded: Loaded, kind: str) -> None:
    """Cutting the graph at one tap or keeping it up to an earlier one is the same to the last bit."""
    layers = LAYERS[loaded.name]
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    together = program_pass(loaded.programs[kind], layers, images)
    for layer in (layers[len(layers) // 2], layers[-1]):
        alone = program_pass(loaded.programs[kind], (layer,), images)

        assert torch.equal(together.scores, alone.scores)
        assert torch.equal(together.activations[layer], alone.activations[layer])
        assert torch.equal(together.gradients[layer], alone.gradients[layer])


@pytest.mark.parametrize("kind", HOOKED_KINDS)
def test_front_then_tail_gives_the_same_bits(loaded: Loaded, kind: str) -> None:
    """A program cut in two computes what it computes whole."""
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(10))
    program = loaded.programs[kind]
    cut = program.cut(TapName.parse(LAYERS[loaded.name][-1]))

    assert torch.equal(program.run(images), cut.tail(*cut.front(images)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(loaded: Loaded, kind: str) -> None:
    """No `.grad`, no hooks, the same weights as the network's own by name and byte."""
    program = loaded.programs[kind]
    program_pass(program, LAYERS[loaded.name], torch.randn(1, 3, SIZE, SIZE))

    assert all(tensor.grad is None and not tensor.requires_grad for tensor in program.tensors().values())
    state = loaded.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in program.tensors().items() if name in state)
    assert state.keys() <= program.tensors().keys()
    module = getattr(program, "_module", None)
    if isinstance(module, nn.Module):
        assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_weights_have_one_digest_in_every_kind(loaded: Loaded) -> None:
    """The audit record names the weights, not the file they came in."""
    assert 1 == len({loaded.programs[kind].digests().weights for kind in KINDS})


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_every_kind_gives_the_same_bits_at_full_size(loaded: Loaded, rows: int) -> None:
    """At 224 pixels too; the export is made again, since its image size is fixed."""
    images = torch.randn(2, 3, 224, 224)
    archive = io.BytesIO()
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        torch.export.save(torch.export.export(loaded.network, (images,), dynamic_shapes=(batch,)), archive)
    archive.seek(0)
    programs = {**loaded.programs, "exported": load_export(archive, device=CPU)}

    _check_all(dataclasses.replace(loaded, programs=programs), rows, 224)

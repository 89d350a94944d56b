"""TorchScript programs of real architectures equal their eager models with forward hooks, bit for bit."""

import io
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn

from camserve.server.engine.program import TapName
from camserve.server.engine.script import ScriptProgram, load_script

QUICK = {
    "resnet18": ["conv1", "layer3.1.relu", "layer4"],
    "mobilenet_v3_small": ["features.4.block.2", "features.12"],
}
THOROUGH = {
    "resnet18": ["bn1", "relu", "layer1", "layer2.0.bn2", "layer4.1.conv1", "avgpool"],
    "mobilenet_v3_small": ["features.0", "features.3", "features.9.block.2.activation", "features.12.2"],
    "efficientnet_b0": ["features.0.2", "features.3", "features.6.1.block.2", "features.8"],
    "densenet121": ["features.relu0", "features.denseblock2", "features.denseblock4.denselayer16", "features.norm5"],
    "convnext_tiny": ["features.1", "features.1.0.block.2", "features.3.1.block", "features.7"],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads of a busy machine wait more than they compute; bits are compared at equal thread counts."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> nn.Module:
    """The eager model with random weights, frozen."""
    return torchvision.models.get_model(name, weights=None).eval().requires_grad_(requires_grad=False)


def program_of(model: nn.Module, how: str) -> ScriptProgram:
    """The same model, scripted or traced at batch 2, saved and loaded."""
    archive = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(2, 3, 96, 96))
    stream = io.BytesIO()
    torch.jit.save(archive, stream)
    stream.seek(0)
    return load_script(stream, device=torch.device("cpu"))


def hooked(model: nn.Module, layer: str, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, activation, gradient) with a forward hook on the layer's last call."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        kept.append(output.clone() if output.requires_grad else output.clone().requires_grad_())
        return kept[-1].clone()

    with model.get_submodule(layer).register_forward_hook(keep):
        logits = model(inputs)
    (gradient,) = torch.autograd.grad(logits[:, :3].sum(), kept[-1])
    return logits, kept[-1], gradient


def differences(model: nn.Module, program: ScriptProgram, layer: str, batch: int) -> list[str]:
    """What is not bit-equal to the eager model, in words."""
    x, tap = torch.randn(batch, 3, 96, 96), TapName.parse(layer)
    expected = hooked(model, layer, x)
    capture = program.capture([tap], x)
    activation = capture.activations[tap]
    (gradient,) = torch.autograd.grad(capture.outputs[:, :3].sum(), activation)
    cut = program.cut(tap)
    front, crossing = cut.front(x)
    with torch.no_grad():
        tails = [cut.tail(front, crossing) for _ in range(2)]
    pairs = {
        "run": (expected[0], program.run(x)),
        "outputs": (expected[0], capture.outputs),
        "activation": (expected[1], activation),
        "gradient": (expected[2], gradient),
        "front": (expected[1], front),
        "tail": (expected[0], tails[0]),
        "tail again": (expected[0], tails[1]),
    }
    return [f"{layer} at {batch}: {name}" for name, (first, second) in pairs.items() if not torch.equal(first, second)]


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("name", QUICK)
def test_archives_equal_eager_hooks(name: str, how: str) -> None:
    """Outputs, activations, gradients and both halves of a cut, at two batch sizes."""
    model = build(name)
    program = program_of(model, how)

    assert [] == [found for b in (1, 3) for layer in QUICK[name] for found in differences(model, program, layer, b)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("name", THOROUGH)
def test_archives_equal_eager_hooks_at_every_batch_size(name: str, how: str) -> None:
    """The same for more architectures, layers and batch sizes."""
    model = build(name)
    program = program_of(model, how)

    assert [] == [
        found for b in (1, 2, 3, 8) for layer in THOROUGH[name] for found in differences(model, program, layer, b)
    ]


def test_scripted_and_traced_archives_list_the_same_calls() -> None:
    """resnet18 makes 75 calls of 67 modules: `relu` twice in each of its 8 blocks."""
    model = build("resnet18")
    scripted, traced = program_of(model, "script").calls(), program_of(model, "trace").calls()

    assert (75, 67) == (len(scripted), len({call.path for call in scripted}))
    assert [(call.path, call.index) for call in scripted] == [(call.path, call.index) for call in traced]
    assert {path for path, _ in model.named_modules() if path} == {call.path for call in scripted}
    assert {""} == {call.refusal for call in scripted}


@pytest.mark.slow
def test_a_segmentation_model_returns_a_dict_and_its_backbone_is_tapped_by_key() -> None:
    """deeplabv3: the backbone's `out`, found in the graph though the model builds the dict in a loop."""
    model = torchvision.models.get_model("deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None).eval()
    program, x, tap = program_of(model, "script"), torch.randn(1, 3, 96, 96), TapName.parse("backbone:out")
    capture = program.capture([tap], x)
    cut = program.cut(tap)

    assert torch.equal(model(x)["out"], capture.outputs["out"])
    assert torch.equal(model.backbone(x)["out"], capture.activations[tap])
    assert torch.equal(capture.outputs["out"], cut.tail(*cut.front(x))["out"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RCNN always returns:UserWarning")  # The model's own, told from inside the archive.
def test_a_detection_model_takes_images_and_is_tapped() -> None:
    """Faster R-CNN: list input, several outputs, objects of script classes, loops; its feature maps are there."""
    model = torchvision.models.get_model(
        "fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None
    ).eval()
    program, x = program_of(model, "script"), torch.randn(1, 3, 96, 96)
    capture = program.capture([TapName.parse("backbone.body:0")], x)

    assert (1, 160) == tuple(capture.activations[TapName.parse("backbone.body:0")].shape[:2])
    assert str(program.run(x)) == str(program.run(x))

"""Every method of the table gives one map whatever kind of program it looks at: scripted, traced, exported or eager."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from camserve.server.cam.methods import METHODS, Need, Reads, WorkClass
from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import load_export
from camserve.server.engine.passes import Amplification, Mapped, PassModel, run_pass
from camserve.server.engine.probe import probe
from camserve.server.engine.program import Program
from camserve.server.engine.script import ScriptProgram
from camserve.server.jobs import ClassIndex, Parameters, Polarity, RawMap, Score, Spec, Target

CPU = torch.device("cpu")
KINDS = ("eager", "scripted", "traced", "exported")
ROWS = 2
SIZE = 24
ATTENTION = tuple(slug for slug, method in METHODS.items() if method.reads is Reads.ATTENTION)
CONVOLUTIONAL = tuple(slug for slug in METHODS if slug not in ATTENTION)
# Enough to do all that the method does, few enough to do it for every kind.
SMALL = {
    "samples": 4,
    "steps": 4,
    "channels": 5,
    "window": 8,
    "stride": 8,
    "concepts": 2,
}


class ConvNet(nn.Module):
    """Convolutions, batch normalisation, ReLU modules in place and not, a residual, average pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.join = nn.ReLU()
        self.last = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b 5)."""
        features = self.stem(images)
        features = self.join(self.block(features) + features)
        logits: Tensor = self.head(torch.flatten(self.pool(self.last(features)), 1))
        return logits


def programs_of(network: nn.Module) -> dict[str, Program]:
    """The network as each kind of program."""
    example = images()
    script, archive = io.BytesIO(), io.BytesIO()
    exported = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},))
    torch.export.save(exported, archive)
    archive.seek(0)
    torch.jit.save(torch.jit.script(network), script)
    script.seek(0)
    # With gradients on: without them attention takes a fast path that has no derivative, and the trace would keep it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # A transformer checks its input's size.
        traced = torch.jit.trace(network, example, check_trace=False)
    return {
        "eager": EagerProgram(copy.deepcopy(network), device=CPU, dtype=torch.float32),
        "scripted": ScriptProgram(torch.jit.load(script), device=CPU, dtype=torch.float32),
        "traced": ScriptProgram(traced, device=CPU, dtype=torch.float32),
        "exported": load_export(archive, device=CPU, dtype=torch.float32),
    }


def model_of(program: Program) -> PassModel:
    """Loaded as a server does."""
    report = probe(program, images())
    return PassModel(
        program=program,
        layouts=report.layouts,
        classes=report.classes,
        head=report.head,
        head_layer=report.head_layer,
        max_rows=4,
    )


def images() -> Tensor:
    """Noise (rows 3 h w)."""
    return torch.randn(ROWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def convolutional() -> dict[str, PassModel]:
    """ConvNet with statistics that are not the trivial ones, as each kind of program."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvNet()
        network.train()
        with torch.no_grad():
            for _ in range(5):
                network(torch.randn(8, 3, SIZE, SIZE))
    return {kind: model_of(program) for kind, program in programs_of(network.eval()).items()}


@pytest.fixture(scope="module")
def transformer() -> dict[str, PassModel]:
    """A small ViT with a head that is not zero, as each kind of program."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = VisionTransformer(
            image_size=SIZE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
        )
        nn.init.normal_(network.heads.head.weight)
    return {kind: model_of(program) for kind, program in programs_of(network.eval()).items()}


def maps(model: PassModel, slug: str, target: Target, layer: str) -> list[np.ndarray]:
    """Both rows' maps of one method."""
    method = METHODS[slug]
    spec = Spec(
        index=0,
        method=slug,
        layers=(layer,) if method.reads is Reads.LAYERS else (),
        target=target if method.has_target else Target(),
        rectify=False,
        parameters=Parameters(**{name: value for name, value in SMALL.items() if name in method.parameters}),
    )
    found: list[tuple[int, RawMap]] = []
    for event in run_pass(model, images(), [(spec,)] * ROWS):
        if isinstance(event, Mapped):
            assert isinstance(event.result, RawMap), event.result
            found.append((event.row, event.result))
        if isinstance(event, Amplification):
            while not event.is_done:
                found += [(event.row, result) for result in event.advance()]
    assert {row for row, _ in found} == set(range(ROWS))
    assert all(isinstance(result, RawMap) for _, result in found), found
    return [result.values for _, result in sorted(found, key=lambda pair: (pair[0], pair[1].target.rank))]


def assert_alike(expected: list[np.ndarray], got: list[np.ndarray], tolerance: float) -> None:
    """Largest difference as a share of the map's largest magnitude."""
    for one, other in zip(expected, got, strict=True):
        assert one.any()
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * float(np.abs(one).max()))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("slug", CONVOLUTIONAL)
def test_a_method_gives_one_map_on_every_kind_of_program(
    convolutional: dict[str, PassModel], slug: str, kind: str
) -> None:
    """Same weights, same input, same method: what kind of file the model came in does not show."""
    target = Target(about=ClassIndex(2))
    # Scored forwards are folded and fused where the program can be; softmax over channels multiplies what that moves.
    tolerance = 1e-5 if METHODS[slug].work is not WorkClass.AMPLIFIED else 1e-3

    assert_alike(
        maps(convolutional["eager"], slug, target, "last"),
        maps(convolutional[kind], slug, target, "last"),
        tolerance,
    )


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("slug", [*ATTENTION, "grad-cam", "eigen-cam", "ablation-cam"])
def test_transformers_give_one_map_on_every_kind_of_program(
    transformer: dict[str, PassModel], slug: str, kind: str
) -> None:
    """Attention computed step by step has the same probabilities and gradients in Python, in an archive and in an export."""
    target, layer = Target(about=ClassIndex(2)), "encoder.layers.encoder_layer_0.mlp"

    assert_alike(maps(transformer["eager"], slug, target, layer), maps(transformer[kind], slug, target, layer), 1e-4)


@pytest.mark.parametrize(
    "slug",
    [
        slug
        for slug in CONVOLUTIONAL
        if METHODS[slug].has_target and METHODS[slug].needs & {Need.GRADIENT, Need.LINEAR_HEAD}
    ],
)
@pytest.mark.parametrize("score", Score)
def test_evidence_against_is_the_gradient_turned(convolutional: dict[str, PassModel], slug: str, score: Score) -> None:
    """The counterfactual map of a method that is linear in the gradient is the map turned; the others' differ from it."""
    about = ClassIndex(1)
    model = convolutional["scripted"]
    found = {
        polarity: maps(model, slug, Target(about=about, score=score, polarity=polarity), "last")
        for polarity in Polarity
    }

    is_linear = slug in {"cam", "grad-cam", "hirescam", "xgrad-cam", "vanilla-backprop", "gradient-times-input"}
    for positive, negative in zip(found[Polarity.FOR], found[Polarity.AGAINST], strict=True):
        if is_linear:
            np.testing.assert_allclose(negative, -positive, rtol=0, atol=1e-5 * float(np.abs(positive).max()))
        else:
            assert np.isfinite(negative).all()

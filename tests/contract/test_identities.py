"""Identities that hold exactly, through the engine, whatever the weights: oracles that need no library.

Networks are drawn by seed and run in float64 with several rows of different classes in one batch.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camserve.server.cam.methods import METHODS, Evidence, Family, Layerwise
from camserve.server.cam.methods.fullgrad import completeness
from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import load_export
from camserve.server.engine.layout import Layout, LayoutKind
from camserve.server.engine.passes import Mapped, PassModel, run_pass
from camserve.server.engine.probe import probe
from camserve.server.engine.program import Program
from camserve.server.engine.script import load_script
from camserve.server.jobs import ClassIndex, RawMap, Score, Spec, Target

CLASSES = 4
ROWS = (0, 3, 1)
SEEDS = st.integers(0, 2**31)
LAYERED = [slug for slug, method in METHODS.items() if isinstance(method.arithmetic, Layerwise) and slug != "cam"]
GRADIENT_WEIGHTED = [
    slug
    for slug in LAYERED
    if METHODS[slug].family is Family.GRADIENT_WEIGHTED and METHODS[slug].has_target and METHODS[slug].contrast is None
]
# Loading a net is most of an example; shrinking a seed would tell nothing.
few = settings(deadline=None, max_examples=5, phases=[Phase.explicit, Phase.reuse, Phase.generate])


class Pooled(nn.Module):
    """Two convolutions, average pooling and a linear layer: the net that CAM is about."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        logits: Tensor = self.head(self.pool(self.features(images)).flatten(1))
        return logits


class Biased(nn.Module):
    """Everything that adds a constant, and ReLUs and pooling, which add none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 6, 3, 2)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Conv2d(6, 8, 3, padding=1)
        self.neck = nn.Linear(8, 7)
        self.head = nn.Linear(7, CLASSES)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.bias.data.normal_()

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        features = self.pool(self.relu(self.norm(self.stem(images))))
        features = self.relu(self.body(features)).mean(dim=(2, 3))
        logits: Tensor = self.head(self.relu(self.neck(features)))
        return logits


class Axes(nn.Module):
    """The same arithmetic along the first of one, two or three axes; the others have a single cell."""

    def __init__(self, seed: int, axes: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        ones = (1,) * (axes - 1)
        self.first = kind(2, 5, (3, *ones), stride=(2, *ones))
        self.relu = nn.ReLU()
        self.second = kind(5, 6, (3, *ones))
        self.curve = nn.SiLU()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, signals: Tensor) -> Tensor:
        """(b 2 t ones) to (b classes)."""
        logits: Tensor = self.head(self.curve(self.second(self.relu(self.first(signals)))).flatten(2).mean(dim=2))
        return logits


def noise(*shape: int, seed: int) -> Tensor:
    """Of float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loaded(net: nn.Module, inputs: Tensor) -> PassModel:
    """As the server loads it."""
    program = EagerProgram(net.eval(), device="cpu", dtype=torch.float64)
    report = probe(program, inputs)
    return PassModel(
        program=program,
        layouts=report.layouts,
        classes=report.classes,
        head=report.head,
        head_layer=report.head_layer,
    )


def maps(model: PassModel, inputs: Tensor, *specs: Spec) -> list[list[RawMap]]:
    """One list for each row; row r is asked about class `ROWS[r]`, unless a method takes no target."""
    rows = [tuple(_about(index, spec, class_index) for index, spec in enumerate(specs)) for class_index in ROWS]
    found: dict[tuple[int, int], RawMap] = {}
    for event in run_pass(model, inputs, rows):
        if isinstance(event, Mapped):
            assert isinstance(event.result, RawMap), event.result
            found[event.row, event.result.spec_index] = event.result
    return [[found[row, index] for index in range(len(specs))] for row in range(len(ROWS))]


def _about(index: int, spec: Spec, class_index: int) -> Spec:
    has_target = METHODS[spec.method].has_target
    about = Target(about=ClassIndex(class_index), score=spec.target.score) if has_target else Target()
    return Spec(index=index, method=spec.method, layers=spec.layers, target=about, rectify=False)


def spec(method: str, layer: str, score: Score = Score.LOGIT) -> Spec:
    """At one layer, signed."""
    return Spec(index=0, method=method, layers=(layer,), target=Target(score=score))


def peak_scaled(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Divided by the largest magnitude."""
    return np.asarray(values / np.abs(values.astype(np.float64)).max())


@few
@given(seed=SEEDS)
def test_average_pooling_and_a_linear_head_make_four_methods_one(seed: int) -> None:
    """At the last convolution Grad-CAM, HiResCAM and XGrad-CAM are CAM over the number of cells."""
    inputs = noise(3, 3, 16, 14, seed=seed)
    model = loaded(Pooled(seed), inputs)

    for row in maps(model, inputs, *(spec(m, "features.3") for m in ("cam", "grad-cam", "hirescam", "xgrad-cam"))):
        cam, *others = (one.values for one in row)
        for values in others:
            np.testing.assert_allclose(cam, values * cam.size, rtol=0, atol=1e-6 * np.abs(cam).max())


@few
@given(seed=SEEDS)
def test_hirescam_takes_the_score_apart(seed: int) -> None:
    """Behind average pooling and a linear layer its sum is the logit less the bias."""
    inputs = noise(3, 3, 16, 14, seed=seed)
    net = Pooled(seed)
    bias = net.head.bias.detach().numpy()

    for (one,), class_index in zip(
        maps(loaded(net, inputs), inputs, spec("hirescam", "features.3")), ROWS, strict=True
    ):
        assert one.values.astype(np.float64).sum() == pytest.approx(one.target.value - bias[class_index], abs=1e-6)


@few
@given(seed=SEEDS)
def test_layercam_is_nowhere_below_hirescam(seed: int) -> None:
    """Behind a ReLU, where A is nowhere negative, leaving negative gradients out can only add."""
    inputs = noise(3, 3, 16, 14, seed=seed)

    for layercam, hirescam in maps(
        loaded(Biased(seed), inputs), inputs, spec("layercam", "pool"), spec("hirescam", "pool")
    ):
        assert (layercam.values >= hirescam.values - 1e-6 * np.abs(hirescam.values).max()).all()


def programs(net: nn.Module, inputs: Tensor) -> dict[str, Program]:
    """The same net in every form."""
    script, export = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(net), script)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.export.save(torch.export.export(net, (inputs,), dynamic_shapes=(batch,)), export)
    script.seek(0)
    export.seek(0)
    return {
        "script": load_script(script, device=torch.device("cpu"), dtype=torch.float64),
        "export": load_export(export, device=torch.device("cpu"), dtype=torch.float64),
        "eager": EagerProgram(net, device="cpu", dtype=torch.float64),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_fullgrad_is_complete_in_every_form(seed: int) -> None:
    """The input's part and every constant's part add up to the logit (arXiv:1905.00780, proposition 1)."""
    inputs = noise(3, 3, 16, 14, seed=seed)
    for kind, program in programs(Biased(seed).double().eval(), inputs).items():
        program.run(inputs)  # An eager program learns its calls from its first forward.
        biases = program.biases()
        leaf = inputs.clone().requires_grad_()
        capture = program.capture(list(biases), leaf)
        scores = capture.outputs.gather(1, torch.tensor(ROWS)[:, None])[:, 0]
        values = [leaf, *(capture.activations[tap] for tap in biases)]
        gradients = torch.autograd.grad(scores.sum(), values)
        evidences = [
            Evidence(activation=value.detach(), gradient=gradient, bias=bias)
            for value, gradient, bias in zip(values, gradients, [None, *biases.values()], strict=True)
        ]

        torch.testing.assert_close(completeness(evidences), scores.detach(), rtol=1e-9, atol=1e-9, msg=kind)


@few
@given(seed=SEEDS, shift=st.floats(-50, 50))
def test_no_constant_beside_a_logit_shows(seed: int, shift: float) -> None:
    """Gradient methods see a logit's gradient only: adding constants to the logits changes no bit of any map."""
    inputs = noise(3, 3, 16, 14, seed=seed)
    plain, shifted = Pooled(seed), Pooled(seed)
    shifted.head.bias.data += shift * torch.tensor([1.0, -1.0, 0.5, 2.0])
    specs = [spec(method, "features.2") for method in GRADIENT_WEIGHTED]

    before, after = (maps(loaded(net, inputs), inputs, *specs) for net in (plain, shifted))

    for row, row_after in zip(before, after, strict=True):
        for one, other in zip(row, row_after, strict=True):
            np.testing.assert_array_equal(one.values, other.values)


@few
@given(seed=SEEDS)
def test_constants_beside_logits_show_in_probabilities(seed: int) -> None:
    """A softmax compares the logits, so that what favours another class changes its gradient."""
    inputs = noise(3, 3, 16, 14, seed=seed)
    plain, shifted = Pooled(seed), Pooled(seed)
    shifted.head.bias.data += torch.tensor([1.0, -1.0, 0.5, 2.0])

    before, after = (
        maps(loaded(net, inputs), inputs, spec("hirescam", "features.2", Score.SOFTMAX)) for net in (plain, shifted)
    )

    for (one,), (other,) in zip(before, after, strict=True):
        assert np.abs(one.values - other.values).max() > 1e-3 * np.abs(one.values).max()


@few
@given(seed=SEEDS, length=st.integers(9, 24))
def test_curves_and_volumes_are_images_with_axes_of_one(seed: int, length: int) -> None:
    """Every method at a layer gives (t), (t 1) and (t 1 1) the same values."""
    found = []
    for axes in (1, 2, 3):
        inputs = noise(3, 2, length, *(1,) * (axes - 1), seed=seed)
        program = EagerProgram(Axes(seed, axes).eval(), device="cpu", dtype=torch.float64)
        grid = ((length - 3) // 2 - 1, *(1,) * (axes - 1))
        model = PassModel(
            program=program,
            layouts={"second": Layout(kind=LayoutKind.CHANNELS_FIRST, grid=grid, channels=6)},
            classes=CLASSES,
        )
        found.append(maps(model, inputs, *(spec(method, "second") for method in LAYERED)))

    for curves, images, volumes in zip(*found, strict=True):
        for method, curve, image, volume in zip(LAYERED, curves, images, volumes, strict=True):
            scale = max(float(np.abs(curve.values).max()), 1e-12)
            assert curve.values.ndim + 1 == image.values.ndim == volume.values.ndim - 1
            np.testing.assert_allclose(curve.values, image.values[:, 0], rtol=0, atol=1e-6 * scale, err_msg=method)
            np.testing.assert_allclose(curve.values, volume.values[:, 0, 0], rtol=0, atol=1e-6 * scale, err_msg=method)


@few
@given(seed=SEEDS)
def test_shapleycam_is_grad_cam_where_nothing_curves(seed: int) -> None:
    """Behind ReLUs alone the Hessian is zero, so that nothing is taken from the gradient (arXiv:2501.06261)."""
    inputs = noise(3, 3, 16, 14, seed=seed)

    for shapley, grad_cam in maps(
        loaded(Biased(seed), inputs), inputs, spec("shapley-cam", "norm"), spec("grad-cam", "norm")
    ):
        np.testing.assert_allclose(shapley.values, grad_cam.values, rtol=0, atol=1e-6 * np.abs(grad_cam.values).max())

"""What Ablation-CAM and Score-CAM cost here and in pytorch-grad-cam: ResNet-50, 224 px, one image, the last stage.

Printed by `make bench`. Both libraries' and our turns are taken in one run on the same machine, so the ratios count.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pytorch_grad_cam import AblationCAM, ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from camserve.server.cam.maps import normalise, resize
from camserve.server.engine.passes import Amplification, run_pass
from camserve.server.jobs import ClassIndex, FloatArray, Normalisation, Parameters, Profile, RawMap, Spec, Target
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.loader import load_model
from camserve.server.models.repository import ServedModel
from camserve.server.models.sources import ModelSource

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

CLASS = 7
CHANNELS = 2048
# pytorch-grad-cam takes minutes for one Ablation-CAM and for one Score-CAM.
ROUNDS = 2


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """ResNet-50 with seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.resnet50(weights=None).eval()


@pytest.fixture(scope="module")
def image() -> Tensor:
    """(1 3 224 224): smooth, so that neighbouring pixels have to do with each other."""
    noise = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(noise, size=(224, 224), mode="bicubic")


def served(net: nn.Module, folder: Path, precision: str = "float32") -> ServedModel:
    """The net as a server loads it from a scripted archive."""
    path = folder / f"{precision}.pt"
    torch.jit.save(torch.jit.script(net), str(path))
    config = ModelConfig(input=InputConfig(size=(224, 224)), default_layer="layer4", max_batch=32, precision=precision)
    source = ModelSource(name="resnet50", version="1", path=path, config=config)
    return load_model(source, device=torch.device("cpu"), max_batch_rows=32)


def explained(model: ServedModel, image: Tensor, method: str, profile: Profile = Profile.PAPER) -> FloatArray:
    """One map, by one pass and the work behind it."""
    spec = Spec(
        index=0,
        method=method,
        layers=("layer4",),
        target=Target(about=ClassIndex(CLASS)),
        profile=profile,
        rectify=False,
        normalisation=Normalisation.NONE,
        parameters=Parameters(),
    )
    (work,) = [event for event in run_pass(model.pass_model, image, [(spec,)]) if isinstance(event, Amplification)]
    results: list[object] = []
    while not work.is_done:
        results += work.advance()
    (result,) = results
    assert isinstance(result, RawMap)
    return result.values


def by_library(cam: Callable[..., FloatArray], image: Tensor) -> FloatArray:
    """pytorch-grad-cam's map at the input's size; its progress bar goes nowhere."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        return cam(input_tensor=image, targets=[ClassifierOutputTarget(CLASS)])[0]


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median over the rounds."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def as_library(values: FloatArray) -> FloatArray:
    """Our raw map through pytorch-grad-cam's last steps: rectified, at the input's size, min-max."""
    return normalise(resize(np.maximum(values, 0), (224, 224)))


def untruncated(net: nn.Module, image: Tensor) -> FloatArray:
    """The signed Ablation-CAM by whole forwards in float64, one for each channel, which a hook sets to zero."""
    net, image = copy.deepcopy(net).double(), image.double()
    kept: list[Tensor] = []
    with torch.no_grad():
        handle = net.layer4.register_forward_hook(lambda _module, _inputs, output: kept.append(output.clone()))
        score = net(image)[0, CLASS]
        handle.remove()
        weights = []
        for start in range(0, CHANNELS, 32):
            rows = torch.arange(start, start + 32)

            def ablate(_module: nn.Module, _inputs: object, output: Tensor, rows: Tensor = rows) -> Tensor:
                output = output.clone()
                output[torch.arange(32), rows] = 0
                return output

            handle = net.layer4.register_forward_hook(ablate)
            scores = net(image.expand(32, -1, -1, -1))[:, CLASS]
            handle.remove()
            weights.append((score - scores) / score.abs())
    return (torch.cat(weights)[:, None, None] * kept[0][0]).sum(dim=0).numpy()


def test_ablation_cam(net: nn.Module, image: Tensor, tmp_path: Path) -> None:
    """All 2 048 channels by the tail: the map of whole forwards within 1e-5, at least 200 times faster than the library.

    Equality is held in float64. In float32 a weight is the small difference of two scores, in the whole forward as in the tail:
    either rounds to some 1e-4 of the map's peak, and that is printed.
    """
    models = {precision: served(net, tmp_path, precision) for precision in ("float32", "float64")}
    explained(models["float32"], image, "ablation-cam")  # The first cut and the first spread are made once a model.

    ours = seconds(lambda: explained(models["float32"], image, "ablation-cam"), ROUNDS)
    library = seconds(lambda: by_library(AblationCAM(net, [net.layer4], batch_size=32), image), 1)
    expected = untruncated(net, image)
    peak = float(np.abs(expected).max())
    differences = {
        precision: float(np.abs(explained(model, image, "ablation-cam") - expected).max()) / peak
        for precision, model in models.items()
    }

    print(  # noqa: T201 - the point of a benchmark
        f"\nAblation-CAM, {CHANNELS} channels: {ours:.2f} s here, {library:.1f} s in pytorch-grad-cam: {library / ours:.0f} "
        f"times; from whole forwards in float64: {differences['float64']:.1e} of the signed map's peak, "
        f"in float32 {differences['float32']:.1e}"
    )
    assert differences["float64"] <= 1e-5
    assert library >= 200 * ours


def test_score_cam(net: nn.Module, image: Tensor, tmp_path: Path) -> None:
    """All 2 048 masks: the library's map, at least 1.2 times faster in float32."""
    models = {precision: served(net, tmp_path, precision) for precision in ("float32", "bfloat16")}
    taken: dict[str, list[float]] = {name: [] for name in (*models, "library")}
    maps: dict[str, FloatArray] = {}
    for _ in range(ROUNDS):
        for precision, model in models.items():
            started = time.perf_counter()
            maps[precision] = as_library(explained(model, image, "score-cam", Profile.PYTORCH_GRAD_CAM))
            taken[precision].append(time.perf_counter() - started)
        cam = ScoreCAM(net, [net.layer4])
        cam.batch_size = 32
        started = time.perf_counter()
        maps["library"] = by_library(cam, image)
        taken["library"].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    difference = float(np.abs(maps["float32"] - maps["library"]).max())
    correlation = float(np.corrcoef(maps["bfloat16"].ravel(), maps["library"].ravel())[0, 1])

    ratios = {precision: medians["library"] / medians[precision] for precision in models}
    print(  # noqa: T201 - the point of a benchmark
        f"\nScore-CAM, {CHANNELS} channels: pytorch-grad-cam {medians['library']:.1f} s; "
        f"float32 {ratios['float32']:.2f} times faster, bfloat16 {ratios['bfloat16']:.2f}; "
        f"largest difference {difference:.1e}, bfloat16 r {correlation:.5f}"
    )
    assert difference <= 1e-4
    assert ratios["float32"] >= 1.2

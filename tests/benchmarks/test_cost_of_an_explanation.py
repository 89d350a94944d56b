"""What an explanation costs beside the prediction: ResNet-50, 224 px, batch 8, Grad-CAM at the last stage.

Printed by `make bench`. Machines differ and are shared, so only ratios inside one run count: the variants take turns, and the
medians over the rounds are compared.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from support.servers import settings

from camserve.client import AsyncClient, Spec, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.engine.passes import PassModel, run_pass
from camserve.server.jobs import Spec as EngineSpec
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.loader import load_model
from camserve.server.models.sources import ModelSource

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]

BATCH = 8
ROUNDS = 9


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A scripted ResNet-50 with seeded random weights."""
    path = tmp_path_factory.mktemp("resnet50") / "model.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.resnet50(weights=None).eval()
    torch.jit.save(torch.jit.script(module), str(path))
    config = ModelConfig(input=InputConfig(size=(224, 224)), default_layer="layer4", max_batch=BATCH)
    return ModelSource(name="resnet50", version="1", path=path, config=config)


def medians(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each variant; they take turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def table(title: str, measured: dict[str, float], base: str) -> None:
    """Prints milliseconds an image and the ratio to the base."""
    print(f"\n{title}: ResNet-50, {BATCH} images, {torch.get_num_threads()} threads")  # noqa: T201 - the point of a benchmark
    for name, seconds in measured.items():
        print(f"  {name:44s} {seconds / BATCH * 1e3:7.1f} ms/image   {seconds / measured[base]:5.2f} x")  # noqa: T201


def test_engine(source):
    """In the engine, one pass with Grad-CAM for every row costs at most 1.10 of the program's own forward."""
    served = load_model(source, device=torch.device("cpu"), max_batch_rows=BATCH)
    model: PassModel = served.pass_model
    frozen = torch.jit.freeze(torch.jit.load(str(source.path)).eval())
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    spec = EngineSpec(index=0, method="grad-cam", layers=("layer4",))
    all_methods = tuple(
        EngineSpec(index=index, method=method, layers=("layer4",))
        for index, method in enumerate(["grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "cam"])
    )

    def forward_of_frozen() -> None:
        with torch.no_grad():
            frozen(images)

    measured = medians(
        {
            "forward, torch.jit.freeze": forward_of_frozen,
            "forward, camserve": lambda: model.program.run(images),
            "pass without explanations": lambda: list(run_pass(model, images, [()] * BATCH)),
            "pass with Grad-CAM for every row": lambda: list(run_pass(model, images, [(spec,)] * BATCH)),
            "pass with six methods for every row": lambda: list(run_pass(model, images, [all_methods] * BATCH)),
        }
    )

    table("engine", measured, "forward, camserve")
    assert measured["pass with Grad-CAM for every row"] <= 1.10 * measured["forward, camserve"]


def test_server(source):
    """Through the server, eight requests at once: with Grad-CAM against prediction only."""
    rows = [
        TensorInput(row) for row in np.random.default_rng(0).standard_normal((BATCH, 3, 224, 224)).astype(np.float32)
    ]
    with BackgroundServer(settings(max_batch_rows=BATCH, batch_window_seconds=0.1), [source]) as server:

        async def explain_all(client: AsyncClient, specs: list[Spec]) -> float:
            results = await asyncio.gather(*(client.explain(row, model="resnet50", specs=specs) for row in rows))
            return statistics.mean(result.summary.batch_rows for result in results)

        async def run() -> tuple[dict[str, float], float]:
            seconds: dict[str, list[float]] = {"prediction only": [], "with Grad-CAM": []}
            filled = []
            async with AsyncClient(server.target) as client:
                for _ in range(ROUNDS + 1):
                    for name, specs in (("prediction only", []), ("with Grad-CAM", [Spec("grad-cam")])):
                        started = time.perf_counter()
                        filled.append(await explain_all(client, specs))
                        seconds[name].append(time.perf_counter() - started)
            return {name: statistics.median(values[1:]) for name, values in seconds.items()}, statistics.mean(filled)

        measured, mean_rows = asyncio.run(run())

    table(f"server (mean rows a pass {mean_rows:.1f})", measured, "prediction only")
    assert measured["with Grad-CAM"] <= 1.25 * measured["prediction only"]

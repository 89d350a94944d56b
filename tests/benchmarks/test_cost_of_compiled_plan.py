"""What compiling the plan gains: ResNet-50, 224 px, batches of 8, Grad-CAM at the last stage.

Printed by `make bench`. Machines differ and are shared, so only ratios inside one run count: the variants take turns, and the
medians over the rounds are compared. Compiling itself takes minutes where others want the cores.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torchvision

from camserve.server.engine.passes import PassModel, run_pass
from camserve.server.engine.script_graph import interpreted
from camserve.server.jobs import Spec
from camserve.server.models.compiling import compile_plan
from camserve.server.models.config import InputConfig, ModelConfig, PlanConfig
from camserve.server.models.loader import load_model
from camserve.server.models.sources import ModelSource

pytestmark = [pytest.mark.benchmark, pytest.mark.needs_compiler, pytest.mark.timeout(2400)]

BATCH = 8
ROUNDS = 7


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ModelSource:
    """A scripted ResNet-50 with seeded random weights that asks to be compiled for full batches."""
    path = tmp_path_factory.mktemp("resnet50") / "model.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.resnet50(weights=None).eval()
    torch.jit.save(torch.jit.script(module), str(path))
    config = ModelConfig(
        input=InputConfig(size=(224, 224)),
        default_layer="layer4",
        max_batch=BATCH,
        plan=PlanConfig(compile=True, batch_sizes=(BATCH,)),
    )
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


def frozen_forwards(source: ModelSource, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The fastest ways torch has of running nothing but the forward, without compiling it."""
    module = torch.jit.load(str(source.path)).to(memory_format=torch.channels_last).eval()
    frozen = torch.jit.freeze(module)
    fused = torch.jit.optimize_for_inference(torch.jit.freeze(copy.deepcopy(module)))
    batch = images.contiguous(memory_format=torch.channels_last)

    def forward_of(program: Callable[..., object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad(), interpreted():
                return program(batch)

        return run

    return {"forward, frozen, channels last": forward_of(frozen), "forward, fused for inference": forward_of(fused)}


def passes(model: PassModel, images: torch.Tensor, specs: tuple[Spec, ...]) -> Callable[[], object]:
    """A pass over all images, each with these specs."""
    return lambda: list(run_pass(model, images, [specs] * len(images)))


async def at_once(work):
    """Stands for the device thread: nothing else wants it here."""
    return work()


def test_compiled_plan(source):
    """With Grad-CAM for every row the compiled plan is faster than the ordinary one, and full batches gain most."""
    served = load_model(source, device=torch.device("cpu"), max_batch_rows=BATCH, most_threads=torch.get_num_threads())
    started = time.perf_counter()
    note = asyncio.run(compile_plan(source, served, cache=None, on_device=at_once))
    compiling = time.perf_counter() - started
    compiled = served.pass_model
    ordinary = dataclasses.replace(compiled, compiled=None)
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    specs = (Spec(index=0, method="grad-cam", layers=("layer4",)),)

    full = medians(
        {
            **frozen_forwards(source, images),
            "ordinary pass without explanations": passes(ordinary, images, ()),
            "ordinary pass with Grad-CAM": passes(ordinary, images, specs),
            "compiled pass with Grad-CAM": passes(compiled, images, specs),
        }
    )
    package = compiled.compiled.live[BATCH]
    always = dataclasses.replace(package, gain=float(BATCH))
    compiled.compiled.adopt(always)  # Also where the rows of padding cost more than the package gains.
    filled = {
        rows: medians(
            {"ordinary": passes(ordinary, images[:rows], specs), "compiled": passes(compiled, images[:rows], specs)}
        )
        for rows in (7, 6, 5)
    }

    print(f"\ncompiled plan: ResNet-50, {torch.get_num_threads()} threads; {note}, in {compiling:.0f} s")  # noqa: T201
    for name, seconds in full.items():
        ratio = seconds / full["ordinary pass with Grad-CAM"]
        print(f"  {name:44s} {seconds / BATCH * 1e3:7.1f} ms/image   {ratio:5.2f} x")  # noqa: T201
    for rows, seconds in filled.items():
        print(f"  {rows} rows filled up to {BATCH}: {seconds['compiled'] / seconds['ordinary']:5.2f} x")  # noqa: T201
    assert full["compiled pass with Grad-CAM"] < full["ordinary pass with Grad-CAM"]

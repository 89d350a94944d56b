"""What compiling the plan gains: 224 px, batches of 8, Grad-CAM at the default layer.

Printed by `make bench`. Machines differ and are shared, so only ratios inside one run count: the variants take turns, and medians
of processor time over the rounds are compared. Compiling itself takes minutes where others want the cores.
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

from camserve.server.engine.compiled import LivePackage
from camserve.server.engine.compiled_build import load_package
from camserve.server.engine.passes import PassModel, run_pass
from camserve.server.engine.script_graph import interpreted
from camserve.server.jobs import Spec
from camserve.server.models.compiling import compile_plan, package_name
from camserve.server.models.config import InputConfig, ModelConfig, PlanConfig
from camserve.server.models.loader import load_model
from camserve.server.models.sources import ModelSource

pytestmark = [pytest.mark.benchmark, pytest.mark.needs_compiler, pytest.mark.timeout(2400)]

BATCH = 8
ROUNDS = 7


@pytest.fixture(scope="module", params=["resnet50", "convnext_tiny"])
def source(request, tmp_path_factory) -> ModelSource:
    """A scripted model with seeded random weights that asks to be compiled for full batches."""
    path = tmp_path_factory.mktemp(request.param) / "model.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(torchvision.models, request.param)(weights=None).eval()
    torch.jit.save(torch.jit.script(module), str(path))
    config = ModelConfig(
        input=InputConfig(size=(224, 224)), max_batch=BATCH, plan=PlanConfig(compile=True, batch_sizes=(BATCH,))
    )
    return ModelSource(name=request.param, version="1", path=path, config=config)


def medians(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of processor time of each variant; they take turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS + 1):
        for name, run in variants.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
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


def test_compiled_plan(source, tmp_path):
    """With Grad-CAM for every row a full batch costs no more than on the ordinary plan, whatever the trial found."""
    threads = torch.get_num_threads()
    served = load_model(source, device=torch.device("cpu"), max_batch_rows=BATCH, most_threads=threads)
    started = time.perf_counter()
    note = asyncio.run(compile_plan(source, served, cache=tmp_path / "plans", on_device=at_once))
    compiling = time.perf_counter() - started
    compiled = served.pass_model
    ordinary = dataclasses.replace(compiled, compiled=None)
    # Adopted whatever the trial said, also for so few rows that filling up costs more than the package gains.
    package = load_package(tmp_path / "plans" / package_name(served.card, source, BATCH))
    compiled.compiled.adopt(LivePackage(rows=BATCH, run=package, gain=2.0 * BATCH))
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    specs = (Spec(index=0, method="grad-cam", layers=(served.card.default_layer,)),)
    base = "ordinary pass with Grad-CAM"

    measured = medians(
        {
            **frozen_forwards(source, images),
            "ordinary pass without explanations": passes(ordinary, images, ()),
            base: passes(ordinary, images, specs),
            "compiled pass with Grad-CAM": passes(compiled, images, specs),
            "ordinary pass, half the rows": passes(ordinary, images[: BATCH // 2], specs),
            "compiled pass, half the rows, filled up": passes(compiled, images[: BATCH // 2], specs),
        }
    )

    print(f"\n{source.name}, {BATCH} images, {threads} threads; {note}, in {compiling:.0f} s")  # noqa: T201
    for name, seconds in measured.items():
        print(f"  {name:44s} {seconds * 1e3:7.1f} ms   {seconds / measured[base]:5.2f} x")  # noqa: T201
    assert measured["compiled pass with Grad-CAM"] <= 1.05 * measured[base]

"""What an explanation costs beside the prediction, in the engine and through a server: ResNet-50, 224 px.

Printed by `make bench`. Machines differ and are shared, so only ratios inside one run count: the variants take turns, and the
medians over the rounds are compared.
"""

from __future__ import annotations

import asyncio
import copy
import functools
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
from camserve.server.engine.script_graph import interpreted
from camserve.server.jobs import ClassIndex, Target
from camserve.server.jobs import Spec as EngineSpec
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.loader import load_model
from camserve.server.models.sources import ModelSource

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]

BATCH = 8
ROUNDS = 7
METHODS = ["grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "cam"]
STAGES = ["layer1", "layer2", "layer3", "layer4"]


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 has matrix units of its own here, and not only wider vectors."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()  # No public name tells.


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A scripted ResNet-50 with seeded random weights."""
    path = tmp_path_factory.mktemp("resnet50") / "model.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.resnet50(weights=None).eval()
    torch.jit.save(torch.jit.script(module), str(path))
    return path


@pytest.fixture(scope="module")
def source(archive):
    """It, as a server is given it."""
    config = ModelConfig(input=InputConfig(size=(224, 224)), default_layer="layer4", max_batch=BATCH)
    return ModelSource(name="resnet50", version="1", path=archive, config=config)


def loaded(archive, precision: str) -> PassModel:
    """It, as the engine runs it."""
    config = ModelConfig(
        input=InputConfig(size=(224, 224)), default_layer="layer4", max_batch=BATCH, precision=precision
    )
    model_source = ModelSource(name="resnet50", version="1", path=archive, config=config)
    threads = torch.get_num_threads()
    return load_model(model_source, device=torch.device("cpu"), max_batch_rows=BATCH, most_threads=threads).pass_model


def forwards(archive, precision: str, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The fastest ways torch has of running nothing but the forward, without compiling it."""
    dtype = getattr(torch, precision)
    module = torch.jit.load(str(archive)).to(dtype).to(memory_format=torch.channels_last).eval()
    frozen = torch.jit.freeze(module)
    fused = torch.jit.optimize_for_inference(torch.jit.freeze(copy.deepcopy(module)))
    batch = images.to(dtype).contiguous(memory_format=torch.channels_last)

    def forward_of(program: Callable[..., object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad(), interpreted():
                return program(batch)

        return run

    return {"forward, frozen, channels last": forward_of(frozen), "forward, fused for inference": forward_of(fused)}


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


def run_all(model: PassModel, images: torch.Tensor, rows: list[tuple[EngineSpec, ...]]) -> list[object]:
    """One pass to its end."""
    return list(run_pass(model, images, rows))


# Without matrix units the last stage's gradient in bfloat16 costs as much as in float32, beside a forward of half the time.
@pytest.mark.parametrize(
    ("precision", "reach"), [("float32", 1.05), ("bfloat16", 1.08 if has_fast_bfloat16() else 1.15)]
)
def test_engine(archive, precision: str, reach: float):
    """One pass with Grad-CAM at the last stage for every row costs hardly more than the fastest forward without any."""
    model = loaded(archive, precision)
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    fastest = forwards(archive, precision, images)
    at = {layer: (EngineSpec(index=0, method="grad-cam", layers=(layer,)),) for layer in STAGES}
    all_methods = tuple(
        EngineSpec(index=index, method=method, layers=("layer4",)) for index, method in enumerate(METHODS)
    )

    measured = medians(
        {
            **fastest,
            "pass without explanations": lambda: run_all(model, images, [()] * BATCH),
            "pass with Grad-CAM at layer4": lambda: run_all(model, images, [at["layer4"]] * BATCH),
            "pass with six methods for every row": lambda: run_all(model, images, [all_methods] * BATCH),
            **{
                f"pass with Grad-CAM at {layer}": functools.partial(run_all, model, images, [at[layer]] * BATCH)
                for layer in reversed(STAGES[:-1])
            },
        }
    )

    best = min(fastest, key=measured.__getitem__)
    table(f"engine, {precision}", measured, best)
    assert measured["pass with Grad-CAM at layer4"] <= reach * measured[best]


def test_sharing(archive):
    """What requests ask for hardly matters to the pass they share; what would be passes of their own is one."""
    model = loaded(archive, "float32")
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def spec(place: int, method: str, layer: str, index: int = 0) -> EngineSpec:
        has_target = method != "eigen-cam"
        target = Target(about=ClassIndex(7 * place % 1000)) if has_target else Target()
        return EngineSpec(index=index, method=method, layers=(layer,), target=target)

    equal = [tuple(spec(0, "grad-cam", "layer4", index) for index in range(4))] * BATCH
    mixed = [
        tuple(spec(row, METHODS[(4 * row + index) % 6], "layer4", index) for index in range(4)) for row in range(BATCH)
    ]
    pairs = [(method, layer) for method in [*METHODS[:5], "eigen-cam"] for layer in STAGES]
    swept = [
        tuple(spec(row, *pairs[(4 * row + index) % len(pairs)], index) for index in range(4)) for row in range(BATCH)
    ]
    key_wise = [
        [tuple(one for one in row if (one.method, one.layers[0]) == pair) for row in swept]
        for pair in dict.fromkeys(pairs)
    ]

    def each_key_alone() -> None:
        for rows in key_wise:
            wanted = [place for place, specs in enumerate(rows) if specs]
            run_all(model, images[wanted], [rows[place] for place in wanted])

    measured = medians(
        {
            "32 explanations, equal": lambda: run_all(model, images, equal),
            "32 explanations, 6 methods, own targets": lambda: run_all(model, images, mixed),
            "32 explanations, 6 methods x 4 layers": lambda: run_all(model, images, swept),
            "the same, a pass for each method and layer": each_key_alone,
        }
    )

    table("sharing", measured, "32 explanations, equal")
    print(  # noqa: T201
        "  one pass / a pass for each: "
        f"{measured['32 explanations, 6 methods x 4 layers'] / measured['the same, a pass for each method and layer']:.2f}"
    )
    assert measured["32 explanations, 6 methods, own targets"] <= 1.05 * measured["32 explanations, equal"]
    assert (
        measured["32 explanations, 6 methods x 4 layers"]
        <= 0.3 * measured["the same, a pass for each method and layer"]
    )


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

"""Many callers at once: different models, methods, layers, classes and encodings; some leave at random stages, some inputs fail.

Every map that arrives must have the digest of the same map made elsewhere, alone, in a pass of as many rows. Afterwards the
models have the same bytes and nobody's hooks, the queue is empty, memory is flat and no thread is left.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import resource
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fragile import breaks, fragile_source
from support.nets import FailsOnBrightRows, TinyNet
from support.servers import Metrics, script_source, settings, until
from support.storm import Answer, Leaving, Scene, draw, marked, send_all
from torch import Tensor, nn

from camserve.client import Spec, TensorInput, TopK
from camserve.server.background import BackgroundServer
from camserve.server.engine.hooked import HookedProgram
from camserve.server.local import LocalExplainer
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

MAX_BATCH = 4
THREADS = 6
MOST_GROWTH_BYTES = 10 << 20
INPUT = InputConfig(size=(32, 32))
LAYERWISE = ("grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "eigen-cam", "finer-cam", "shapley-cam")
WHOLE = ("guided-backprop", "vanilla-backprop")
ENCODINGS = itertools.cycle(("float32", "uint8", "float16", "png8"))


class Residual(nn.Module):
    """A block with batch normalisation and a skip, whose one activation is called twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.relu = nn.ReLU(inplace=True)
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
            self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        x = self.relu(self.stem(x))
        scores: Tensor = self.head(self.relu(self.body(x) + x).mean((2, 3)))
        return scores


def specs_at(*layers: str, whole: Sequence[str] = WHOLE) -> list[Spec]:
    """Methods of one forward, of one gradient and amplified ones, at several layers, about several targets."""
    targets = (None, 0, 3, TopK(2))
    found = [
        Spec(method, layers=[layer], target=None if method == "eigen-cam" else target, encoding=next(ENCODINGS))
        for (method, layer), target in zip(itertools.product(LAYERWISE, layers), itertools.cycle(targets), strict=False)
    ]
    found += [Spec(method, saliency="gray", encoding=next(ENCODINGS)) for method in whole]
    found += [Spec("fullgrad", target=0)] if whole == WHOLE else []
    for layer in layers:
        found += [
            Spec("ablation-cam", layers=[layer], target=1),
            Spec("ablation-cam", layers=[layer], target=TopK(2), channels=5),
            Spec("score-cam", layers=[layer], target=TopK(2)),
        ]
    return [*found, Spec("occlusion", window=16, stride=8), Spec("smoothgrad", samples=5, seed=3, saliency="gray")]


def export_source(name: str, module: nn.Module, folder: Path) -> ModelSource:
    """Saves a module as an archive of torch.export, for any number of rows."""
    path = folder / f"{name}.pt2"
    rows = torch.export.Dim("rows", min=1, max=64)
    example = torch.zeros(2, 3, 32, 32)
    torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=({0: rows},)), path)
    return ModelSource(name=name, version="1", path=path, config=ModelConfig(input=INPUT))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ModelSource]:
    """Programs of every kind."""
    folder: Path = tmp_path_factory.mktemp("models")
    return [
        script_source("scripted", TinyNet(), folder),
        export_source("exported", Residual(), folder),
        script_source("moody", FailsOnBrightRows(), folder),
        fragile_source(breaks, max_batch=1),
    ]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """What may be asked of each; some inputs make a model fail."""
    generator = np.random.default_rng(0)
    inputs = list(generator.standard_normal((3, 3, 32, 32)).astype(np.float32))
    tiny = specs_at("stem", "body")
    return [
        Scene(model="scripted", inputs=inputs, specs=tiny),
        Scene(model="exported", inputs=inputs, specs=specs_at("stem", "relu#0", "relu#1")),
        Scene(model="moody", inputs=[*inputs, inputs[0] + 3], specs=tiny),
        Scene(model="breaks", inputs=[*inputs, marked(inputs[0])], specs=specs_at("body", whole=["vanilla-backprop"])),
    ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the server's: the number of threads moves last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Reference:
    """Maps made in this process, by models of its own, one request at a time."""

    def __init__(self, sources: Sequence[ModelSource]) -> None:
        config = settings(max_batch_rows=MAX_BATCH)
        self._explainers = {source.name: LocalExplainer(source, config) for source in sources}
        self._known: dict[Hashable, Mapping[int, str]] = {}

    def digests(self, scene: Scene, place: int, spec: Spec, rows: int) -> Mapping[int, str]:
        """Of the map of each target, in a pass of so many rows."""
        key = (scene.model, place, spec, rows)
        if key not in self._known:
            explainer = self._explainers[scene.model]
            result = explainer.explain(TensorInput(scene.inputs[place]), [spec], batch_rows=rows)
            self._known[key] = {heatmap.target_index: heatmap.raw_sha256 for heatmap in result.heatmaps}
        return self._known[key]

    def wrong(self, answer: Answer) -> list[str]:
        """What is wrong with the maps of an answer; those that came without a summary may be of a pass of any size."""
        request = answer.request
        most = 1 if request.scene.model == "breaks" else MAX_BATCH
        sizes = range(1, most + 1) if answer.batch_rows is None else [answer.batch_rows]
        told = []
        for spec_index, target_index, digest in answer.digests:
            spec = request.specs[spec_index]
            expected = {self.digests(request.scene, request.place, spec, rows)[target_index] for rows in sizes}
            if digest not in expected:
                told.append(f"{request.scene.model} {spec} of input {request.place}, {answer.batch_rows} rows")
        return told


def is_complete(answer: Answer) -> bool:
    """Whether a caller that stayed got every map, or was told for each spec, or as a whole, what its input did."""
    request = answer.request
    is_bright = request.scene.model == "moody" and request.place == 3
    is_marked = request.scene.model == "breaks" and request.place == 3
    if is_bright:
        return answer.failure == "INTERNAL MODEL_FAILED"
    broken = [
        index
        for index, spec in enumerate(request.specs)
        if is_marked and spec.method == "ablation-cam" and spec.channels is None
    ]
    maps = sum(
        spec.target.k if isinstance(spec.target, TopK) else 1
        for index, spec in enumerate(request.specs)
        if index not in broken
    )
    return (
        not answer.failure
        and len(answer.digests) == maps
        and sorted(answer.errors) == [(index, "MODEL_FAILED") for index in broken]
    )


def resident_bytes() -> int:
    """What this process keeps in memory, free blocks given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def lasting_threads() -> set[str]:
    """The names of all threads but the decoders', whose pool grows up to its size when as many requests come at once."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("camserve-worker")}


def assert_untouched(server: BackgroundServer, weights: Mapping[str, str]) -> None:
    """Every model has its bytes, no gradients and no hooks."""
    for slot in server.app.repository.slots():
        assert slot.served is not None
        program = slot.served.program
        assert weights[slot.name] == program.digests().weights
        assert not [
            name for name, tensor in program.tensors().items() if tensor.requires_grad or tensor.grad is not None
        ]
        if isinstance(program, HookedProgram):
            modules = list(program._module.modules())
            assert not [module for module in modules if module._forward_hooks or module._forward_pre_hooks]


def weather(sources: Sequence[ModelSource], scenes: Sequence[Scene], count: int) -> list[Answer]:
    """Serves the models through a storm and checks the server; returns what came."""
    others = set(threading.enumerate())
    config = settings(max_batch_rows=MAX_BATCH, torch_threads=1, batch_window_seconds=0.002)
    with BackgroundServer(config, sources) as server:
        weights = {slot.name: slot.served.program.digests().weights for slot in server.app.repository.slots()}
        metrics = Metrics(server)
        warm_up = send_all(server.target, draw(scenes, count // 2, seed=0), THREADS)
        before, threads = resident_bytes(), lasting_threads()
        answers = send_all(server.target, draw(scenes, count - count // 2, seed=1), THREADS)
        asyncio.run(until(lambda: metrics.value("camserve_requests_in_flight") == 0))
        server.run(idle(server)).result()
        assert 0 == metrics.value("camserve_queue_depth")
        assert 0 == metrics.value("camserve_held_bytes")
        assert not server.app._runner.has_amplified
        grown = resident_bytes() - before
        assert [] == sorted(lasting_threads() - threads)
        assert_untouched(server, weights)
    left = set(threading.enumerate()) - others
    assert [] == [thread for thread in left if thread.name.startswith("camserve")]
    assert grown < MOST_GROWTH_BYTES
    return warm_up + answers


async def idle(server: BackgroundServer) -> None:
    """Returns when the device has dropped the amplified work of those who left."""
    while server.app._runner.has_amplified:
        await server.app._runner.call(lambda: None)


def check(sources: Sequence[ModelSource], scenes: Sequence[Scene], count: int) -> None:
    """One storm, and what it must leave."""
    answers = weather(sources, scenes, count)
    reference = Reference(sources)

    assert count == len(answers)
    assert [] == [line for answer in answers for line in reference.wrong(answer)]
    stayed = [answer for answer in answers if answer.request.leaving is Leaving.STAYS]
    assert [] == [answer for answer in stayed if not is_complete(answer)]
    left = {answer.failure.partition(" ")[0] for answer in answers if answer.request.leaving is not Leaving.STAYS}
    assert left <= {"", "INTERNAL", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    # The storm was one: passes were shared, inputs failed, callers left before, in and after their maps.
    assert max(answer.batch_rows or 0 for answer in answers) > 1
    assert any(answer.errors for answer in answers)
    # Deadlines that the door sees cannot be met are refused there.
    assert "CANCELLED" in left
    assert left & {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


def test_storm(sources, scenes):
    """A hundred and sixty requests from six threads: no wrong map, nothing left behind."""
    check(sources, scenes, 160)


@pytest.mark.slow
def test_long_storm(sources, scenes):
    """The same with a thousand requests."""
    check(sources, scenes, 1000)

"""One pass, many explanations: what shares a pass gets the same bits as alone in a pass of that size, and few passes are run."""

from __future__ import annotations

import asyncio
import collections
import itertools

import numpy as np
import pytest
import torch
from support.gated import GATE, gated_source
from support.nets import TinyNet
from support.servers import Metrics, script_source, settings, until

from camserve.client import AsyncClient, Client, Spec, TensorInput, TopK
from camserve.server.background import BackgroundServer
from camserve.server.models.sources import demo_sources

METHODS = ("cam", "grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "eigen-cam")
ENCODINGS = ("float32", "uint8", "float16", "png8")
MAX_BATCH = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Two models, float32, and a third in float64; a window long enough that whatever is being decoded shares the pass."""
    folder = tmp_path_factory.mktemp("models")
    GATE.opened.set()
    tiny = script_source("tiny", TinyNet(), folder)
    double = script_source("double", TinyNet(), folder, precision="float64")
    # What a pass was seen to take while others had the machine must not make passes smaller.
    config = settings(batch_window_seconds=0.2, max_batch_rows=MAX_BATCH, max_pass_seconds=60)
    with BackgroundServer(config, [*demo_sources(), tiny, double, gated_source()]) as running:
        yield running


def mixed_requests(count: int, model: str, size: int, layers: tuple[str, ...]) -> list[tuple[TensorInput, list[Spec]]]:
    """Requests that differ in method, layer, target and encoding, each with its own input.

    Each asks for a Grad-CAM at the earliest layer as well, so that all go equally far back. Whether depths ride together is
    decided by what passes were seen to take (tests/unit/scheduling/test_planner.py), and should not hang on a busy machine here.
    """
    generator = np.random.default_rng(0)
    choices = itertools.cycle(itertools.product(METHODS, layers, (None, 0, TopK(2))))
    encodings = itertools.cycle(ENCODINGS)
    head_layer = layers[-1]
    requests = []
    for _ in range(count):
        method, layer, target = next(choices)
        layer = head_layer if method == "cam" else layer
        target = None if method == "eigen-cam" else target
        tensor = TensorInput(generator.standard_normal((3, size, size)).astype(np.float32))
        specs = [
            Spec(method, layers=[layer], target=target, encoding="float32"),
            Spec(method, layers=[layer], target=target, encoding=next(encodings)),
            Spec("grad-cam", layers=[layers[0]], encoding="float32"),
        ]
        requests.append((tensor, specs))
    return requests


def explain_together(target: str, asked: list[tuple[str, TensorInput, list[Spec]]]):
    """Sends all requests at once; returns their results in order."""

    async def run():
        async with AsyncClient(target, timeout=180) as client:
            return await asyncio.gather(
                *(client.explain(tensor, model=model, specs=specs) for model, tensor, specs in asked)
            )

    return asyncio.run(run())


def test_64_mixed_requests_need_few_passes(server):
    """64 requests over two models need at most models x ceil(rows / max batch) + 2 passes, read from the metrics page.

    The device is held until all of them wait, so that the count does not depend on how fast this machine sends.
    """
    metrics = Metrics(server)
    surface = mixed_requests(32, "surface", 160, ("layer2", "layer4"))
    tiny = mixed_requests(32, "tiny", 32, ("stem", "body"))
    asked = [("surface", *request) for request in surface] + [("tiny", *request) for request in tiny]

    async def run():
        GATE.reset()
        async with AsyncClient(server.target, timeout=180) as client:
            row = TensorInput(np.ones((3, 32, 32), np.float32))
            holder = asyncio.create_task(client.explain(row, model="gated", specs=["grad-cam"]))
            await asyncio.to_thread(GATE.reached.wait, 120)
            before = metrics.value("camserve_batch_rows_count")
            calls = [
                asyncio.create_task(client.explain(tensor, model=model, specs=specs)) for model, tensor, specs in asked
            ]
            await until(lambda: metrics.value("camserve_queue_depth") == 64)
            GATE.opened.set()
            await holder
            return await asyncio.gather(*calls), metrics.value("camserve_batch_rows_count") - before

    results, passes = asyncio.run(run())

    assert not [error for result in results for error in result.errors]
    assert passes <= 2 * -(-32 // MAX_BATCH) + 2
    assert any(result.summary.pass_explanations > 8 for result in results)


def test_neighbours_do_not_change_a_bit(server):
    """A request among different neighbours gets the same bits whenever the batch has the same number of rows."""
    ((tensor, _),) = mixed_requests(1, "surface", 160, ("layer4",))
    probe = ("surface", tensor, [Spec(method, encoding="float32") for method in METHODS])
    digests: dict[int, set[tuple[bytes, ...]]] = collections.defaultdict(set)
    others = mixed_requests(60, "surface", 160, ("layer2", "layer4"))
    for start in range(0, 60, 5):
        neighbours = [("surface", *request) for request in others[start : start + 5]]
        place = start // 5 % 6
        mine = explain_together(server.target, [*neighbours[:place], probe, *neighbours[place:]])[place]
        digests[mine.summary.batch_rows].add(tuple(heatmap.raw_sha256 for heatmap in mine.heatmaps))

    assert {1} == {len(found) for found in digests.values()}
    assert max(digests) > 1


def maps_of(results) -> list[np.ndarray]:
    """The exact maps of many results, in order."""
    return [heatmap.values for result in results for heatmap in result.heatmaps if heatmap.encoding == "float32"]


@pytest.mark.parametrize(
    ("model", "size", "layers", "gate"),
    [
        ("double", 32, ("stem", "body"), 1e-9),
        ("surface", 160, ("layer2", "layer4"), 1e-5),
    ],
)
def test_batch_against_alone(server, model, size, layers, gate):
    """In a batch or alone, a map is the same within the gate of its dtype, relative to its largest value."""
    requests = mixed_requests(21, model, size, layers)
    together = explain_together(server.target, [(model, *request) for request in requests])
    with Client(server.target, timeout=180) as client:
        alone = [client.explain(tensor, model=model, specs=specs) for tensor, specs in requests]

    assert max(result.summary.batch_rows for result in together) > 1
    assert {1} == {result.summary.batch_rows for result in alone}
    for expected, got in zip(maps_of(alone), maps_of(together), strict=True):
        # The wire carries float32, which adds its own rounding to the float64 gate.
        rounding = float(np.finfo(np.float32).eps)
        assert np.abs(expected - got).max() <= (gate + rounding) * np.abs(expected).max()


def test_quantised_within_one_step(server):
    """Each quantised map differs from the exact one beside it by at most a step."""
    results = explain_together(
        server.target, [("tiny", *request) for request in mixed_requests(16, "tiny", 32, ("stem", "body"))]
    )

    for result in results:
        half = len(result.heatmaps) // 2
        for exact, coded in zip(result.heatmaps[:half], result.heatmaps[half:-1], strict=True):
            span = float(exact.values.max() - exact.values.min())
            assert np.abs(exact.values - coded.values).max() <= max(span / 255, 1e-3 * span)


@pytest.mark.filterwarnings("ignore")
def test_sample_equals_pytorch_grad_cam(server):
    """Served maps equal those of PyPI's grad-cam, made from the same weights in eager mode."""
    from pytorch_grad_cam import GradCAM, HiResCAM, LayerCAM, XGradCAM  # noqa: PLC0415 - imports matplotlib and OpenCV
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: PLC0415

    net = TinyNet().eval()
    libraries = {"grad-cam": GradCAM, "hirescam": HiResCAM, "layercam": LayerCAM, "xgrad-cam": XGradCAM}
    generator = np.random.default_rng(1)
    inputs = generator.standard_normal((4, 3, 32, 32)).astype(np.float32)
    specs = [Spec(method, layers=["body"], target=1, encoding="float32", size="input") for method in libraries]

    results = explain_together(server.target, [("tiny", TensorInput(row), specs) for row in inputs])

    for place, library in enumerate(libraries.values()):
        with library(net, [net.body]) as cam:
            expected = cam(torch.from_numpy(inputs), [ClassifierOutputTarget(1)] * 4)
        for row in range(4):
            values = results[row].heatmaps[place].values
            spread = values.max() - values.min()
            got = (values - values.min()) / spread if spread > 0 else values
            np.testing.assert_allclose(got, expected[row], atol=2e-5)

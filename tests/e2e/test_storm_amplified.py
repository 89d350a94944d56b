"""Methods that work on one row for long: who leaves is forgotten, who hurries gets what there is, nobody waits behind them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import numpy as np
import pytest
import torch
from support.fragile import SLOW, OneRowOnly, fragile_source, gradients_only, greedy, one_row_only, slow
from support.nets import TinyNet
from support.patience import under_a_deadline
from support.servers import Metrics, script_source, until
from support.storm import marked
from torch import Tensor

from camserve.client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Heatmap,
    Overloaded,
    Prediction,
    Result,
    Spec,
    TensorInput,
    TopK,
    Unavailable,
)
from camserve.server.background import BackgroundServer
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

IMAGE = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
ROW = TensorInput(IMAGE)
# What Score-CAM makes of 16 channels, four at a time: the activations and the first tries, then tries.
FORWARDS_OF_CHUNKS = (2, 1, 1, 1)


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """The slow model makes no forward unless `let` lets it."""
    SLOW.is_held = True
    try:
        yield
    finally:
        SLOW.is_held = False
        let(100)


def forget() -> None:
    """What was let through for nothing must not open the gate of the next test; the device has nothing more to do."""
    while SLOW.turns.acquire(blocking=False) or SLOW.waiting.acquire(blocking=False):
        pass


@pytest.fixture
def held(serve: Callable[..., BackgroundServer]) -> Iterator[BackgroundServer]:
    """A server whose model makes no forward unless `let` lets it."""
    # A forward that is held looks like a long one: that must not keep rows apart.
    server = serve(fragile_source(slow, max_batch=4), batch_window_seconds=0.0, max_pass_seconds=60)
    with holding():
        yield server
    server.run(idle(server)).result()
    forget()


def let(forwards: int) -> None:
    """Lets the model make some forwards."""
    SLOW.turns.release(forwards)


def made(forwards: int) -> None:
    """Waits until the model has begun so many more forwards."""
    for _ in range(forwards):
        assert SLOW.waiting.acquire(timeout=120)


async def idle(server: BackgroundServer) -> None:
    """Returns when the device has nothing more to do."""
    while server.app._runner.has_amplified:
        await server.app._runner.call(lambda: None)
    await server.app._runner.call(lambda: None)


def test_whoever_leaves_stops_the_work_between_chunks(held):
    """A caller that cancels in the second chunk of four costs no third one."""
    metrics = Metrics(held)
    with Client(held.target) as client:
        events = client.stream(ROW, model="slow", specs=["score-cam"])
        # The pass itself and a chunk; a second is begun.
        let(1 + FORWARDS_OF_CHUNKS[0])
        assert isinstance(next(events), Prediction)
        made(2 + FORWARDS_OF_CHUNKS[0])
        events.close()
        asyncio.run(until(lambda: metrics.value("camserve_requests_in_flight") == 0))
        let(1)
        held.run(idle(held)).result(120)

    assert not SLOW.waiting.acquire(blocking=False)
    assert 1 == metrics.value("camserve_cancelled_total", stage="device")


@contextlib.asynccontextmanager
async def four_amplified(server: BackgroundServer, client: AsyncClient) -> AsyncIterator[list[asyncio.Task[Result]]]:
    """Four Score-CAM requests whose pass is over; the first chunk of one of them is begun and held."""
    metrics = Metrics(server)
    # In a lane of its own, which pays for the time that it is held.
    before = asyncio.create_task(client.explain(ROW, model="slow", lane="bulk"))
    await asyncio.to_thread(made, 1)
    calls = [asyncio.create_task(client.explain(ROW, model="slow", specs=["score-cam"])) for _ in range(4)]
    await until(lambda: metrics.value("camserve_queue_depth") == 4)
    # What held the device, then one pass for the four of them.
    let(2)
    await before
    await asyncio.to_thread(made, 2)
    yield calls
    let(100)
    await asyncio.gather(*calls)


async def test_cheap_requests_wait_for_one_chunk_not_for_the_method(held):
    """Beside four amplified requests a cheap one goes after the chunk that is under way, before any other."""
    metrics = Metrics(held)
    async with AsyncClient(held.target) as client, four_amplified(held, client):
        cheap = asyncio.create_task(client.explain(ROW, model="slow", specs=["grad-cam"]))
        await until(lambda: metrics.value("camserve_queue_depth") == 1)
        # The chunk under way, then its pass.
        let(FORWARDS_OF_CHUNKS[0] + 1)
        assert 1 == len((await asyncio.wait_for(cheap, 120)).heatmaps)


async def test_every_caller_of_many_gets_its_turn(held):
    """Four amplified requests go on in turn: none is done before every other has all its chunks but the last."""
    async with AsyncClient(held.target) as client, four_amplified(held, client) as calls:
        before_the_last = 4 * sum(FORWARDS_OF_CHUNKS[:-1])
        let(before_the_last)
        await asyncio.to_thread(made, before_the_last)
        assert not any(call.done() for call in calls)
        let(4)
        digests = {result.heatmaps[0].raw_sha256 for result in await asyncio.gather(*calls)}

    assert 1 == len(digests)


LONG = {"samples": 3000, "seed": 1}


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """An archive of a small network; what takes long is the method."""
    return script_source("tiny", TinyNet(), tmp_path_factory.mktemp("models"))


def test_the_deadline_gives_the_best_map_so_far(serve, long_source):
    """With allow_partial the map comes, flagged, in time; without it the request fails as late."""
    server = serve(long_source)
    spec = Spec("ss-cam", allow_partial=True, **LONG)
    with Client(server.target, timeout=120) as client:
        result = under_a_deadline(
            lambda seconds: client.explain(ROW, model="tiny", specs=[spec], deadline=seconds),
            lambda result: bool(result.heatmaps),
        )
        with pytest.raises(DeadlineExceeded) as caught:
            client.explain(ROW, model="tiny", specs=[Spec("ss-cam", **LONG)], deadline=0.3)

    (heatmap,) = result.heatmaps
    assert "partial" in heatmap.flags
    assert 0 < heatmap.completed < 1
    assert "DEADLINE_EXCEEDED" == caught.value.reason


def test_a_deadline_between_targets_says_which_had_a_map(serve, long_source):
    """Of three targets the first is drawn in part; for the others, not begun, the spec fails and says how far it came."""
    server = serve(long_source)
    spec = Spec("ss-cam", target=TopK(3), allow_partial=True, **LONG)
    with Client(server.target, timeout=120) as client:
        result = under_a_deadline(
            lambda seconds: client.explain(ROW, model="tiny", specs=[spec, "grad-cam"], deadline=seconds),
            lambda result: len(result.heatmaps) > 1,
        )

    assert [(0, 0), (1, 0)] == [(heatmap.spec_index, heatmap.target_index) for heatmap in result.heatmaps]
    assert ["DEADLINE_EXCEEDED"] == [error.error.reason for error in result.errors]
    assert "1 of 3 targets of ss-cam" in str(result.errors[0].error)


def test_a_drain_waits_for_amplified_work(serve):
    """Who was let in before the server began to stop gets the whole map; who comes later is sent elsewhere."""
    server = serve(fragile_source(slow), drain_seconds=120)
    with holding(), Client(server.target, retries=0, timeout=120) as client:
        events = client.stream(ROW, model="slow", specs=["score-cam"])
        let(1)
        assert isinstance(next(events), Prediction)
        draining = server.run(server.app.drain())
        asyncio.run(until(lambda: Metrics(server).value("camserve_draining") == 1))
        with pytest.raises(Unavailable):
            client.explain(ROW, model="slow")
        let(100)
        rest = list(events)
        assert draining.result(120)
    forget()

    (heatmap,) = [event for event in rest if isinstance(event, Heatmap)]
    assert 1.0 == heatmap.completed


def test_a_drain_ends_at_its_limit(serve, long_source):
    """Work that outlasts the drain is given up: its caller is told, and the server ends with an idle device."""
    server = serve(long_source, drain_seconds=0.2)
    with Client(server.target, retries=0) as client:
        events = client.stream(ROW, model="tiny", specs=[Spec("ss-cam", **LONG)])
        assert isinstance(next(events), Prediction)
        is_idle = server.run(server.app.drain()).result(120)
        with pytest.raises(Unavailable):
            list(events)

    assert is_idle


@contextlib.contextmanager
def memory_for(rows: int) -> Iterator[None]:
    """As if the device had become smaller."""
    OneRowOnly.allowance, before = rows, OneRowOnly.allowance
    try:
        yield
    finally:
        OneRowOnly.allowance = before


def test_memory_for_one_row_is_enough(serve):
    """A pass of four rows, and tries of four at a time, are halved until they fit; the maps are those of enough memory."""
    server = serve(fragile_source(one_row_only, max_batch=4), batch_window_seconds=0.3)
    specs = [
        "grad-cam",
        Spec("score-cam", target=TopK(2)),
        Spec("ablation-cam", layers=["stem"]),
        Spec("smoothgrad", samples=5),
    ]
    specs.append(Spec("occlusion", window=16, stride=16))

    async def run() -> list[list[Heatmap]]:
        async with AsyncClient(server.target) as client:
            calls = [client.explain(ROW, model="one-row-only", specs=specs) for _ in range(4)]
            results = await asyncio.gather(*calls)
            assert [] == [error for result in results for error in result.errors]
            return [list(result.heatmaps) for result in results]

    roomy = asyncio.run(run())
    with memory_for(1):
        tight = asyncio.run(run())

    for expected, got in zip(roomy, tight, strict=True):
        for one, other in zip(expected, got, strict=True):
            np.testing.assert_allclose(other.values, one.values, atol=1e-5 * np.abs(one.values).max())


def test_no_memory_at_all_is_told(serve):
    """Where not even one row fits, the answer says so and what would help; the next request is answered."""
    server = serve(fragile_source(one_row_only))
    with Client(server.target, retries=0) as client:
        with memory_for(0), pytest.raises(Overloaded, match="ran out of memory for one row") as caught:
            client.explain(ROW, model="one-row-only", specs=["score-cam"])
        assert "OUT_OF_MEMORY" == caught.value.reason
        assert client.explain(ROW, model="one-row-only", specs=["score-cam"]).heatmaps


def test_memory_of_the_cpu_is_told_alike(serve):
    """An allocation that fails on the CPU, a plain RuntimeError, is told as memory that ran out; the server goes on."""
    server = serve(fragile_source(greedy))
    with Client(server.target, retries=0) as client:
        with pytest.raises(Overloaded, match="ran out of memory for one row of model 'greedy'") as caught:
            client.explain(TensorInput(marked(IMAGE)), model="greedy", specs=["grad-cam"])
        assert "OUT_OF_MEMORY" == caught.value.reason
        assert client.explain(ROW, model="greedy", specs=["grad-cam"]).heatmaps


def test_memory_that_runs_out_under_way_fails_that_spec_alone(serve):
    """The pass has room for its row and the tries have none: Score-CAM fails by name, Grad-CAM is there."""
    server = serve(fragile_source(one_row_only))
    with Client(server.target, retries=0) as client:
        events = client.stream(ROW, model="one-row-only", specs=["grad-cam", Spec("rise", samples=2000)])
        taken = [next(events), next(events)]
        with memory_for(0):
            taken += list(events)

    assert isinstance(taken[1], Heatmap)
    error = taken[2].error
    assert isinstance(error, Overloaded)
    assert ("OUT_OF_MEMORY", 1) == (error.reason, taken[2].spec_index)
    assert "rise" in str(error)


@pytest.mark.parametrize("method", ["ablation-cam", "score-cam"])
def test_targets_and_layers_of_amplified_methods_are_those_asked_alone(serve, long_source, method):
    """Three targets at two layers give in one request what each target gives alone, in order."""
    server = serve(long_source)
    together = Spec(method, layers=["stem", "body"], target=TopK(3), fusion="max")
    with Client(server.target) as client:
        result = client.explain(
            ROW, model="tiny", specs=[together, Spec(method, layers=["body", "stem"], fusion="max")]
        )
        classes = [heatmap.target.class_index for heatmap in result.heatmaps[:3]]
        alone = client.explain(
            ROW,
            model="tiny",
            specs=[Spec(method, layers=["stem", "body"], target=index, fusion="max") for index in classes],
        )

    assert [scored.class_index for scored in result.prediction.classes[:3]] == classes
    assert [heatmap.raw_sha256 for heatmap in alone.heatmaps] == [heatmap.raw_sha256 for heatmap in result.heatmaps[:3]]
    assert result.heatmaps[3].raw_sha256 == result.heatmaps[0].raw_sha256


def test_work_that_fails_as_it_begins_fails_alone(serve):
    """Ablation-CAM whose first forward raises is told by itself; Grad-CAM of the same request and the other request are there."""
    server = serve(fragile_source(gradients_only))
    row = TensorInput(marked(IMAGE))
    specs = ["grad-cam", "ablation-cam", "score-cam"]

    async def run():
        async with AsyncClient(server.target, retries=0) as client:
            calls = [client.explain(sent, model="gradients-only", specs=specs) for sent in (row, ROW)]
            return await asyncio.gather(*calls)

    broken, sound = asyncio.run(run())

    assert [0] == [heatmap.spec_index for heatmap in broken.heatmaps]
    assert [(1, "MODEL_FAILED"), (2, "MODEL_FAILED")] == [
        (error.spec_index, error.error.reason) for error in broken.errors
    ]
    assert all("nobody wants my gradient" in str(error.error) for error in broken.errors)
    assert [0, 1, 2] == [heatmap.spec_index for heatmap in sound.heatmaps]


AMPLIFIED = [
    Spec("ablation-cam", layers=["body"], target=1),
    Spec("ablation-cam", layers=["body"], target=1, channels=5),
    Spec("score-cam", layers=["body"], target=1, channels=5),
    Spec("group-cam", layers=["body"], target=1),
    Spec("smooth-grad-cam++", target=1, samples=5),
    Spec("smoothgrad", target=1, samples=5),
    Spec("integrated-gradients", target=1, steps=5),
    Spec("rise", target=1, samples=7),
    Spec("occlusion", target=1, window=16, stride=8),
    Spec("grad-cam", target=1, augmentation_smooth=True),
]


@pytest.mark.parametrize("kind", ["traced", "exported"])
def test_archives_for_two_rows_only_take_every_amplified_method(serve, long_source, tmp_path, kind):
    """A program of one batch size is given that many rows at each try, the odd one out included; the maps are the same."""
    net, example = TinyNet().eval(), torch.zeros(2, 3, 32, 32)
    path = tmp_path / f"pair.{'pt' if kind == 'traced' else 'pt2'}"
    if kind == "traced":
        torch.jit.save(torch.jit.trace(PairsOnly(), example), str(path))
    else:
        torch.export.save(torch.export.export(net, (example,)), path)
    pair = ModelSource(name="pair", version="1", path=path, config=ModelConfig(input=InputConfig(size=(32, 32))))
    with Client(serve(long_source, pair).target) as client:
        expected = client.explain(ROW, model="tiny", specs=AMPLIFIED).heatmaps
        got = client.explain(ROW, model="pair", specs=AMPLIFIED)

    assert 2 == got.summary.batch_rows
    assert [] == [str(error.error) for error in got.errors]
    for one, other in zip(expected, got.heatmaps, strict=True):
        np.testing.assert_allclose(other.values, one.values, atol=1e-4 * np.abs(one.values).max())


class PairsOnly(TinyNet):
    """Pools as a trace with two rows remembers it."""

    def forward(self, x: Tensor) -> Tensor:
        """(2 3 h w) to (2 classes)."""
        scores: Tensor = self.head(self.body(self.stem(x)).reshape(2, 16, 64).mean(2))
        return scores

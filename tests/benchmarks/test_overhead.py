"""What the front end costs: gRPC, checks, queue, encoding, log and metrics around the smallest model there is.

The control is a bare grpc.aio server that streams back the same three messages. Each server has a process of its own, and the
client here asks both alike, with bytes that are made once and not read. Printed by `make bench`; the two take turns, and medians
over the rounds are compared, because machines are shared.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from support.nets import TinyNet
from support.processes import answer, ask, camserve_process, connected, control_process, explained_tensor

from camserve.v1 import explanation_service_pb2 as service_pb2

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

ROUNDS = 11
REQUESTS = 400
CONCURRENCY = 32
LEAST_SHARE = 0.3
MOST_ADDED_SECONDS = 0.005
# One thread: a second one for a net of this size waits for work by spinning, and takes the front end's core.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def request(side: int) -> bytes:
    """A request for one map of a square tensor."""
    values = np.random.default_rng(0).standard_normal((3, side, side)).astype("<f4")
    return explained_tensor(values.shape, values.tobytes())


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The tiny net, which takes any size."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    torch.jit.save(torch.jit.script(TinyNet().eval()), str(path))
    return path


async def test_requests_a_second_beside_bare_grpc(archive, tmp_path):
    """With one map for each request, at concurrency 32, camserve answers its share of what bare grpc.aio echoes."""
    asked = request(32)
    with camserve_process(archive, 32, tmp_path / "camserve.log", ENVIRONMENT) as served:
        async with connected(served) as explain:
            messages = await answer(explain, asked)
            with control_process(messages, tmp_path, ENVIRONMENT) as control:
                async with connected(control) as echo:
                    shares, rates = [], []
                    for _ in range(ROUNDS + 1):
                        ours = await ask(explain, asked, count=REQUESTS, concurrency=CONCURRENCY)
                        bare = await ask(echo, asked, count=REQUESTS, concurrency=CONCURRENCY)
                        shares.append(bare / ours)
                        rates.append((REQUESTS / ours, REQUESTS / bare))
    share = statistics.median(shares[1:])
    ours_a_second, bare_a_second = (statistics.median(column) for column in zip(*rates[1:], strict=True))

    told = f"{ours_a_second:.0f} explained requests/s, bare grpc.aio {bare_a_second:.0f}, share {share:.2f}"
    print(f"\nfront end: {told}")  # noqa: T201 - the point of a benchmark
    assert share >= LEAST_SHARE


async def test_added_latency_of_one_request(archive, tmp_path):
    """Alone, with a tensor as for ResNet-50 (3 x 224 x 224), a request takes at most 5 ms beyond its pass."""
    asked = request(224)
    added, bare = [], []
    with camserve_process(archive, 224, tmp_path / "camserve.log", ENVIRONMENT) as served:
        async with connected(served) as explain:
            messages = await answer(explain, asked)
            with control_process(messages, tmp_path, ENVIRONMENT) as control:
                async with connected(control) as echo:
                    for _ in range(REQUESTS):
                        seconds, messages = await _timed(explain, asked)
                        added.append(seconds - _pass_seconds(messages))
                        bare.append((await _timed(echo, asked))[0])
    ours, grpcs = statistics.median(added[REQUESTS // 10 :]), statistics.median(bare[REQUESTS // 10 :])

    print(f"\nalone: {ours * 1e3:.2f} ms beyond the pass, of which bare grpc.aio {grpcs * 1e3:.2f} ms")  # noqa: T201 - the point of a benchmark
    assert ours <= MOST_ADDED_SECONDS


async def _timed(call: grpc.aio.UnaryStreamMultiCallable, asked: bytes) -> tuple[float, list[bytes]]:
    """The seconds until the last message, and the messages."""
    started = time.perf_counter()
    messages = await answer(call, asked)
    return time.perf_counter() - started, messages


def _pass_seconds(messages: list[bytes]) -> float:
    """What the summary says of the device."""
    timings = service_pb2.ExplainResponse.FromString(messages[-1]).summary.timings
    return sum(part.seconds + part.nanos / 1e9 for part in (timings.forward, timings.backward, timings.maps))

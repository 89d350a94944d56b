"""What the server keeps after tens of thousands of requests, beside a bare gRPC server that answered as many."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.nets import TinyNet
from support.processes import ServerProcess, answer, ask, camserve_process, connected, control_process, explained_tensor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTLED = 2_000
MEASURED = 20_000
CONCURRENCY = 32
MOST_GROWTH_BYTES = 20 << 20
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


async def growth(server: ServerProcess, request: bytes) -> int:
    """By how many bytes its resident set grows from the 2 000th request to the 22 000th."""
    async with connected(server) as call:
        await ask(call, request, count=SETTLED, concurrency=CONCURRENCY)
        before = server.resident_bytes()
        await ask(call, request, count=MEASURED, concurrency=CONCURRENCY)
        return server.resident_bytes() - before


async def test_memory_is_flat(tmp_path):
    """With logs and metrics on, camserve grows by at most 20 MiB more than gRPC does by itself."""
    archive = tmp_path / "tiny.pt"
    torch.jit.save(torch.jit.script(TinyNet().eval()), str(archive))
    values = np.random.default_rng(0).standard_normal((3, 32, 32)).astype("<f4")
    request = explained_tensor(values.shape, values.tobytes())
    with camserve_process(archive, 32, tmp_path / "camserve.log", ENVIRONMENT) as served:
        async with connected(served) as explain:
            messages = await answer(explain, request)
        ours = await growth(served, request)
    with control_process(messages, tmp_path, ENVIRONMENT) as control:
        bare = await growth(control, request)

    print(f"\ngrowth: camserve {ours / 2**20:.1f} MiB, bare gRPC {bare / 2**20:.1f} MiB")  # noqa: T201 - told in docs
    assert ours - bare <= MOST_GROWTH_BYTES

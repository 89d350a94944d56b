"""New versions one after another while callers ask all the time: nobody is refused, and memory does not grow.

In a process of its own with fixed allocator settings. The short form belongs to every run, the long one to `make test-slow`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.folders import ROW, put_version
from support.processes import ServerProcess

from camserve.client import AsyncClient

CALLERS = 4
CLASSES = 8
# What memory is allowed to grow by between the reload behind which everything has been seen once, and the last.
GROWTH = 0.02
WARM = 20
SETTINGS = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}


@pytest.fixture
def server(tmp_path) -> Iterator[ServerProcess]:
    """`camserve serve` of a repository with one model in version 1."""
    put_version(tmp_path / "models", "part", 1, best=1)
    command = [str(Path(sys.executable).with_name("camserve")), "serve", "--models", str(tmp_path / "models")]
    ports = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--drain-delay-seconds", "0"]
    process = ServerProcess(
        ["-W", "ignore", *command, *ports, "--log-level", "error"], tmp_path / "log", {**os.environ, **SETTINGS}
    )
    yield process
    process.end()


async def reloaded(server: ServerProcess, root: Path, count: int) -> tuple[list[int], int]:
    """Loads that many versions while callers ask.

    Returns:
        Resident bytes behind each reload, and how many requests were answered.
    """
    resident, answered = [], 0
    is_over = asyncio.Event()
    seen: set[str] = set()

    async def ask() -> None:
        nonlocal answered
        async with AsyncClient(server.target, retries=0) as client:
            while not is_over.is_set():
                result = await client.explain(ROW, model="part", specs=["grad-cam", "layercam"])
                # Whoever answers, answers as that version does, with all that was asked for.
                assert int(result.summary.version) % CLASSES == result.prediction.class_index
                assert 2 == len(result.heatmaps)
                seen.add(result.summary.version)
                answered += 1

    async with AsyncClient(server.target) as client, asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(ask())
        for version in range(2, count + 2):
            await asyncio.to_thread(put_version, root, "part", version, version % CLASSES)
            await client.load_model("part")
            await client.unload_model("part", str(version - 1))  # Waits for the unloading that goes on.
            await asyncio.to_thread(shutil.rmtree, root / "part" / str(version - 1))
            resident.append(server.resident_bytes())
        is_over.set()
    assert len(seen) > count / 2
    return resident, answered


def test_a_few_reloads(server, tmp_path):
    """Every request is answered by a version that serves, in full."""
    _resident, answered = asyncio.run(reloaded(server, tmp_path / "models", 5))

    assert answered >= CALLERS


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_reloads(server, tmp_path, record_property):
    """No request fails, and resident memory stays within 2 % of what it was after 20 of them."""
    resident, answered = asyncio.run(reloaded(server, tmp_path / "models", 200))
    server_log = (tmp_path / "log").read_text(encoding="utf-8")
    told = {"answered": answered, **{str(place): resident[place - 1] >> 20 for place in (1, WARM, 60, 100, 150, 200)}}
    print("\nMiB behind reloads, and requests answered:", told)  # noqa: T201 - figures for the docs

    assert "error" not in server_log.lower()
    assert max(resident[-5:]) <= (1 + GROWTH) * max(resident[WARM - 1 : WARM + 5])


@pytest.mark.parametrize("moment", ["loading", "unloading"])
def test_sigterm_while_models_come_and_go(server, tmp_path, moment):
    """The process ends by itself with 0, in time, whatever is being done to a model, and those inside are answered."""
    root = tmp_path / "models"
    put_version(root, "part", 2, best=2)

    async def run():
        async with AsyncClient(server.target, retries=0) as client:
            await client.explain(ROW, model="part")
            calls = [asyncio.create_task(client.explain(ROW, model="part", specs=["grad-cam"])) for _ in range(8)]
            work = client.load_model("part") if moment == "loading" else client.unload_model("part")
            working = asyncio.create_task(work)
            while (await client.models())[-1].state != moment and not working.done():  # noqa: ASYNC110 - asks a process
                await asyncio.sleep(0)  # No time passes: the calls go on.
            server.ask_to_end()
            return await asyncio.gather(*calls, return_exceptions=True), await asyncio.gather(
                working, return_exceptions=True
            )

    results, _ = asyncio.run(run())

    assert 0 == server.ended()
    reasons = {getattr(result, "reason", "answered") for result in results}
    assert reasons <= {"answered", "DRAINING", "MODEL_UNLOADED", ""}
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")

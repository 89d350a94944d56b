"""Compiles the plan of a loaded model in the background: finds each package in the cache or has it made, tries it, lets it serve.

`app.py` runs `compile_plan` as a task beside the serving; a package is built in another process (`compile_process.py`), loaded on
a worker thread, and tried on the device thread one turn at a time. Until it has passed, and wherever it does not, the ordinary
plan serves. What came of it is told in a sentence for the card.
"""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import contextlib
import functools
import hashlib
import json
import os
import platform
import signal
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from camserve.server.engine.compiled import CompiledPlan
from camserve.server.engine.compiled_build import load_package
from camserve.server.engine.compiled_trial import Trial, trial_batch
from camserve.server.engine.look import FAILURES, message_of
from camserve.server.models.card import ModelCard
from camserve.server.models.repository import ServedModel
from camserve.server.models.sources import ModelSource

__all__ = ["OnDevice", "batch_sizes", "compile_plan", "package_name"]

OnDevice: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs something on the device thread between passes; `Runner.call`."""

# Changes when a package of the same model would be built otherwise.
_FORMAT: Final = 1
_TURNS: Final = 3
_START: Final = (
    "import os; os.nice(19)\nfrom camserve.server.models.compile_process import main\nraise SystemExit(main())"
)


async def compile_plan(source: ModelSource, served: ServedModel, *, cache: Path | None, on_device: OnDevice) -> str:
    """Compiles one package after the other: the largest first, which carries most load, then the one for a single row.

    Args:
        source: that the model was loaded from; the other process loads it again.
        served: what serves; its plan takes the packages.
        cache: folder of packages that outlive the server; None for none.
        on_device: runs what touches the model.

    Returns:
        What the card should tell.

    Raises:
        ValueError: the model has no plan to be compiled, or others can write to the cache.
        OSError: the cache cannot be used.
    """
    plan = served.pass_model.compiled
    if plan is None:
        raise ValueError(f"model {served.card.name!r} does not ask for a compiled plan")
    refused: dict[int, str] = {}
    with _folder(cache) as folder, tempfile.TemporaryDirectory(prefix="camserve-compile-") as scratch:
        sizes = batch_sizes(served.card, source.config.plan.batch_sizes)
        for rows in sizes:
            path = folder / package_name(served.card, source, rows)
            if not path.is_file():
                refusal = await _build(source, served.card, rows, path, Path(scratch))
                if refusal:  # What is in the way of one number of rows is in the way of the others.
                    refused.update((size, refusal) for size in sizes if size not in plan.live and size not in refused)
                    break
            try:
                refused[rows] = await _adopt(served, plan, rows, path, on_device)
            except FAILURES as error:
                refused[rows] = message_of(error)
    return _told(plan, {rows: refusal for rows, refusal in refused.items() if refusal})


def batch_sizes(card: ModelCard, asked: Sequence[int]) -> tuple[int, ...]:
    """The numbers of rows that packages are made for, in order.

    Args:
        card: of the model.
        asked: by its `model.toml`; none for the most rows of a pass and every power of two below.
    """
    if card.static_batch_rows is not None:
        return (card.static_batch_rows,)
    most = card.max_batch_rows
    sizes = {min(rows, most) for rows in asked} or {most, *(2**power for power in range(most.bit_length()))}
    first = [rows for rows in (max(sizes), 1) if rows in sizes]
    return tuple(dict.fromkeys([*first, *sorted(sizes, reverse=True)]))


def package_name(card: ModelCard, source: ModelSource, rows: int) -> str:
    """File name of a package: another model, torch, processor or shape has another one."""
    facts = {
        "format": _FORMAT,
        "model": card.model_sha256,
        "torch": torch.__version__,
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor()],
        "device": card.device,
        "dtype": card.dtype,
        "layer": card.default_layer,
        "output": [card.output_kind, source.config.output.path],
        "shape": card.recipe.shape,
        "rows": rows,
        "threads": _threads(card),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{card.name}-{rows}-{digest[:32]}.pt2"


def _threads(card: ModelCard) -> int:
    """Of a pass; loops are compiled for their number."""
    return card.plan.threads or torch.get_num_threads()


@functools.cache
def _processor() -> str:
    """What the processor can do; packages are compiled for exactly that."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()


@contextlib.contextmanager
def _folder(cache: Path | None) -> Iterator[Path]:
    """The cache, or a folder for this one time."""
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="camserve-plans-") as name:
            yield Path(name)
        return
    cache = cache.expanduser()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = cache.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"plan_cache {cache} can be written by others, and packages are run as code; "
            "make it a folder of this user that nobody else writes to (mode 700)"
        )
    yield cache


def _order(source: ModelSource, card: ModelCard, rows: int, path: Path) -> str:
    """What the other process reads."""
    # Imported here: only those who compile load what the other process needs.
    from camserve.server.models.compile_process import Order  # noqa: PLC0415

    order = Order(
        name=source.name,
        version=source.version,
        model=source.path and source.path.absolute(),
        config=source.config,
        shape=card.recipe.shape,
        layer=card.default_layer,
        rows=rows,
        threads=_threads(card),
        path=path.absolute(),
    )
    return order.model_dump_json()


async def _build(source: ModelSource, card: ModelCard, rows: int, path: Path, scratch: Path) -> str:
    """Has a package made; returns why it could not be."""
    order = _order(source, card, rows, path)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _START,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # The compiler it starts ends with it.
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(scratch), "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        _, said = await process.communicate(order.encode())
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if not process.returncode:
        return ""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"the compiling process ended with status {process.returncode}"


async def _adopt(served: ServedModel, plan: CompiledPlan, rows: int, path: Path, on_device: OnDevice) -> str:
    """Loads, tries and lets serve; returns why not."""
    model = served.pass_model
    try:
        package = await asyncio.to_thread(load_package, path)
    except FAILURES:
        # Torch writes what a full disk takes and says nothing: the next start must not find it again.
        with contextlib.suppress(OSError):
            await asyncio.to_thread(path.unlink)
        raise
    batch = trial_batch(model, served.card.recipe.shape, rows)
    trial = Trial(model, served.card.default_layer, package, batch)
    await on_device(trial.check)
    for _ in range(_TURNS):
        await on_device(trial.race)
    if not trial.refusal:
        plan.adopt(trial.live())
    return trial.refusal


def _told(plan: CompiledPlan, refused: dict[int, str]) -> str:
    parts = []
    if plan.live:
        gains = ", ".join(f"{rows} ({live.gain:.2f} times as fast)" for rows, live in plan.live.items())
        parts.append(f"compiled at {plan.layer} for rows: {gains}")
    reasons = dict.fromkeys(refused.values())
    for reason in reasons:
        rows = ", ".join(str(size) for size, why in sorted(refused.items()) if why == reason)
        parts.append(f"not compiled for rows {rows}, the ordinary plan serves: {reason}")
    return "; ".join(parts)

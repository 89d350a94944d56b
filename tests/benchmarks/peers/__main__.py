"""camserve beside the servers people use: the same model, images, load, batch and threads; run by `make bench-peers`.

Servers take turns, each alone on the machine and freshly started each time, in an order that moves on by one every round. Before
it is measured, every server explains the same images, and the run fails when two maps differ. Tables go to standard output and,
with every figure as JSON, to build/bench.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from benchmarks.peers import figures
from benchmarks.peers.answers import Answer, Ask, NotReady
from benchmarks.peers.contenders import CONTENDERS, Contender, Launch, Setup
from benchmarks.peers.figures import Measured
from benchmarks.peers.load import closed_loop
from benchmarks.peers.processes import ProcessTree, interrupt_once, running
from PIL import Image

_START_SECONDS = 300
_COMPARED_IMAGES = 16
_PEERS = ("grad-cam", "litserve", "mlserver", "ray", "torch", "torchvision")


def main() -> int:
    """Returns 1 when a binding claim does not hold."""
    given = _arguments()
    interrupt_once()
    folder = given.out / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(  # noqa: S603 - this interpreter and a module beside this file
        [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.materials", str(folder), str(given.max_batch)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    facts = _facts(given, json.loads(made.stdout))
    images = [path.read_bytes() for path in sorted((folder / "images").iterdir())]
    setup = Setup(
        folder=folder.resolve(),
        python=given.python.absolute(),
        max_batch=given.max_batch,
        threads=given.threads,
        window_seconds=given.window,
        device="cuda" if facts["cuda"] else "cpu",
    )
    contenders = [CONTENDERS[name] for name in given.servers]
    measured: list[Measured] = []
    memory: dict[str, int] = {}
    reference: list[Answer] = []
    for turn in range(given.rounds):
        for index in range(len(contenders)):
            contender = contenders[(index + turn) % len(contenders)]
            _tell(f"round {turn + 1} of {given.rounds}: {contender.title}")
            taken, peak, answered = _turn(contender, setup, images, given.concurrency, given.seconds)
            measured += taken
            memory[contender.name] = max(peak, memory.get(contender.name, 0))
            if contender.explains:
                reference = reference or answered
                _check_agreement(contender, reference, answered)
    order = {name: index for index, name in enumerate(given.servers)}
    measured.sort(key=lambda one: order[one.server])
    return _report(given.out, facts, measured, memory)


def _turn(
    contender: Contender, setup: Setup, images: Sequence[bytes], loads: Sequence[int], seconds: float
) -> tuple[list[Measured], int, list[Answer]]:
    """Starts a server, compares, warms up, measures each load, ends it. Gives figures, peak bytes and answers."""
    launch = contender.launch(setup)
    log = setup.folder / f"{contender.name}.log"
    with (
        # Ray keeps sockets there, whose names must be short.
        tempfile.TemporaryDirectory(prefix="peers", ignore_cleanup_errors=True) as scratch,
        running(launch.command, environment={**launch.environment, "RAY_TMPDIR": scratch}, log=log) as tree,
    ):
        return asyncio.run(_measure(contender, launch, tree, images, loads, seconds))


async def _measure(
    contender: Contender,
    launch: Launch,
    tree: ProcessTree,
    images: Sequence[bytes],
    loads: Sequence[int],
    seconds: float,
) -> tuple[list[Measured], int, list[Answer]]:
    await _until_ready(contender, launch, tree, images[0])
    async with launch.connect() as ask:
        answered = await asyncio.gather(*(ask(image) for image in images[:_COMPARED_IMAGES]))
        # Memory is read during this load, which does not count: reading it takes time from the server.
        peak = await _peak_bytes(ask, tree, images, max(loads), seconds / 2)
        taken = []
        for concurrency in loads:
            finished = await closed_loop(ask, images, concurrency=concurrency, seconds=seconds)
            rate, latencies = figures.counted(finished, concurrency=concurrency, seconds=seconds)
            taken.append(
                Measured(
                    server=contender.name,
                    concurrency=concurrency,
                    images_per_second=rate,
                    latencies=tuple(latencies),
                )
            )
            _tell(f"  {concurrency} callers: {rate:.1f} images/s")
    return taken, peak, list(answered)


async def _until_ready(contender: Contender, launch: Launch, tree: ProcessTree, image: bytes) -> None:
    """Asks until the first answer: what all these servers have in common is that they answer when they are ready."""
    gives_up_at = time.monotonic() + _START_SECONDS
    while True:
        try:
            async with launch.connect() as ask:
                await ask(image)
        except NotReady as error:
            if not tree.is_running or time.monotonic() > gives_up_at:
                raise SystemExit(f"{contender.name} did not start: {error}; its log is beside the materials") from error
            await asyncio.sleep(0.25)  # Another process's readiness can only be asked for again.
        else:
            return


async def _peak_bytes(ask: Ask, tree: ProcessTree, images: Sequence[bytes], concurrency: int, seconds: float) -> int:
    load = asyncio.create_task(closed_loop(ask, images, concurrency=concurrency, seconds=seconds))
    peak = 0
    while not load.done():
        peak = max(peak, await asyncio.to_thread(tree.resident_bytes))
        await asyncio.wait({load}, timeout=0.2)
    await load
    return peak


def _check_agreement(contender: Contender, reference: Sequence[Answer], answered: Sequence[Answer]) -> None:
    """Ends the run when a server explains something else than the first one did."""
    pairs = [
        (one, other) for one, other in zip(reference, answered, strict=True) if one.class_index == other.class_index
    ]
    # Half precision may see another class where two are nearly equal; a map of another class is another map.
    if len(pairs) < 0.75 * len(reference):
        raise SystemExit(f"{contender.name} predicts other classes: {len(pairs)} of {len(reference)} are the same")
    least = min(figures.correlation(_large(one.heatmap), _large(other.heatmap)) for one, other in pairs)
    _tell(f"  same class on {len(pairs)} of {len(reference)} images; least correlation of the maps {least:.5f}")
    if least <= 0.99:
        raise SystemExit(f"{contender.name} gives other maps: correlation {least:.5f}")


def _large(heatmap: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    picture = Image.fromarray(np.asarray(heatmap, np.float32))
    return np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR))


def _report(out: Path, facts: dict[str, object], measured: Sequence[Measured], memory: dict[str, int]) -> int:
    found = figures.rows(measured)
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    table = figures.markdown(found, memory, titles, base="litserve-tuned")
    verdicts = figures.verdicts(measured, memory, has_matrix_units=bool(facts["cuda"] or facts["amx"]))
    lines = [f"- {'yes' if verdict.holds else 'NO'}: {verdict.claim}" for verdict in verdicts]
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = "\n".join(
        [f"ResNet-50, 224 px, JPEG files of 640 by 480, Grad-CAM at layer4. {told}.", "", table, "", *lines, ""]
    )
    (out / "peers.md").write_text(text, encoding="utf-8")
    record = {
        "facts": facts,
        "memory_bytes": memory,
        "measured": [{name: getattr(one, name) for name in Measured.__slots__} for one in measured],
        "verdicts": [{"claim": one.claim, "holds": one.holds, "is_binding": one.is_binding} for one in verdicts],
    }
    (out / "peers.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    _tell("\n" + text)
    return int(any(one.is_binding and not one.holds for one in verdicts))


def _facts(given: argparse.Namespace, made: dict[str, str | None]) -> dict[str, object]:
    script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    answered = subprocess.run(  # noqa: S603 - the peers' interpreter
        [given.python, "-c", script, *_PEERS], check=True, capture_output=True, text=True
    )
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")), "?")
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": platform.machine(),
        "CPU": model,
        "cores": len(os.sched_getaffinity(0)),
        "amx": "amx_bf16" in cpu,
        "cuda": made["cuda"],
        "threads": given.threads,
        "max batch": given.max_batch,
        "window": given.window,
        "rounds": given.rounds,
        "seconds": given.seconds,
        "camserve": importlib.metadata.version("camserve"),
        "camserve's torch": made["torch"],
        **json.loads(answered.stdout),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-peers", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="measured for each server, load and round")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="callers")
    parser.add_argument("--servers", nargs="+", choices=CONTENDERS, metavar="SERVER", help=", ".join(CONTENDERS))
    parser.add_argument("--threads", type=int, default=2, help="torch's, in every server")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--window", type=float, default=0.01, help="seconds that peers wait for a batch to fill")
    parser.add_argument("--python", type=Path, default=Path("build/peers/env/bin/python"), help="with the peers")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    given = parser.parse_args()
    given.servers = given.servers or [name for name, contender in CONTENDERS.items() if contender.is_default]
    return given


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

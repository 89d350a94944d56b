"""Hours of mixed load on one server, and whether it is afterwards what it was before; run by `make soak`.

Callers explain, amplify, leave, read slowly, send nonsense and reload a model, while memory, file descriptors, threads and the
time of a small request are sampled. The last lines are the verdict; every figure goes to build/soak as JSON and as Markdown.
Ctrl-C ends it early, with a verdict on what there was.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime as dt
import importlib.metadata
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from soak.acts import write_repository
from soak.mixture import Course, Plan, Window, soak
from soak.verdict import Finding, Limits, judge, markdown
from support.load import Served, machine_load, started, total
from support.processes import STEADY

_HELD = ("requests_in_flight", "queue_depth", "queue_bytes", "hooks")
_EMPTY_WITHIN_SECONDS = 60.0
_FLAGS = ["--listen", "127.0.0.1:0", "--log-level", "warning"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when something is not well."""
    given = _arguments(arguments)
    window = given.window or min(60.0, given.seconds / 40)
    plan = Plan(seconds=given.seconds, window_seconds=window, rate=given.rate, seed=given.seed)
    limits = Limits(
        growth_bytes=given.most_growth_mib * 2**20, drift=math.inf if given.most_drift is None else given.most_drift
    )
    given.out.mkdir(parents=True, exist_ok=True)
    before = machine_load()
    with tempfile.TemporaryDirectory() as folder:
        repository = write_repository(Path(folder) / "models")
        log = given.out / "server.log"
        served = started(["--models", str(repository), *_FLAGS], log, STEADY, is_apart=True, torch_threads=1)
        try:
            course, left = asyncio.run(_run(served, repository, plan))
        finally:
            served.process.ask_to_end()
            status = served.process.ended()
    findings = [
        *judge(course, left, limits),
        Finding(name="end", is_well=status == 0, said=f"exit status {status}"),
    ]
    version = importlib.metadata.version("camserve")
    title = f"Soak of {plan.seconds / 60:.0f} min at {plan.rate:g} acts a second, camserve {version}"
    page = markdown(course, findings, f"{title}; {before}")
    (given.out / "soak.md").write_text(page, encoding="utf-8")
    (given.out / "soak.json").write_text(json.dumps(_document(course, findings, plan), indent=1), encoding="utf-8")
    _say(page)
    return 0 if all(finding.is_well for finding in findings) else 1


async def _run(served: Served, repository: Path, plan: Plan) -> tuple[Course, list[str]]:
    """Soaks, and asks the server what it still holds when all have gone."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    course = await soak(served, repository, plan, stop=stop, tell=_tell)
    left: list[str] = []
    try:
        async with asyncio.timeout(_EMPTY_WITHIN_SECONDS):
            # Another process's page has no events.
            while left := await asyncio.to_thread(_held, served):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    except TimeoutError:
        pass
    except OSError as error:
        left = [f"the metrics page does not answer: {error}"]
    return course, left


def _held(served: Served) -> list[str]:
    samples = served.metrics()
    return [f"camserve_{name} {value:g}" for name in _HELD if (value := total(samples, f"camserve_{name}"))]


def _tell(window: Window) -> None:
    _say(
        f"{window.ended_seconds:7.0f} s  {window.resident_bytes / 2**20:7.1f} MiB  {window.descriptors:3.0f} descriptors  "
        f"{window.threads:3.0f} threads  p99 {window.probe_p99_seconds * 1e3:6.1f} ms  {window.cpu_share:.2f} cores"
    )


def _document(course: Course, findings: Sequence[Finding], plan: Plan) -> dict[str, object]:
    return {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "plan": dataclasses.asdict(plan),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "ends": [
            {"act": act, "status": status, "count": count} for (act, status), count in sorted(course.ends.items())
        ],
        "wrong": course.wrong,
        "windows": [dataclasses.asdict(window) for window in course.windows],
    }


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's output


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description="Mixed load for hours, and a verdict.")
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SOAK_SECONDS", "7200")))
    parser.add_argument(
        "--window", type=float, help="Seconds of one window; a fortieth of all, at most 60, unless told."
    )
    parser.add_argument("--rate", type=float, default=float(os.environ.get("SOAK_RATE", "20")), help="Acts a second.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    parser.add_argument("--most-growth-mib", type=float, default=20.0)
    parser.add_argument(
        "--most-drift", type=float, help="Of the probes' p99, as a share; told but not judged by default."
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

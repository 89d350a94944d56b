"""A run as JSON: `camserve bench --json FILE`. docs/bench.md tells every key; a change of their meaning changes SCHEMA_VERSION.

`command.py` fills in a `Run` as the sweep goes on, and it is written here and drawn by `page.py`. All times are in seconds.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final

from camserve.client.bench.figures import Percentiles, StepFigures
from camserve.client.bench.kinds import KindOfRequest
from camserve.client.bench.records import Closed, Failure, Load
from camserve.client.bench.sweep import PREDICTION, LoadResult
from camserve.client.cards import ModelCard

SCHEMA: Final = "camserve-bench"
SCHEMA_VERSION: Final = 1


@dataclasses.dataclass(slots=True, kw_only=True)
class Run:
    """Everything about one run; results and what was missed are added while it goes on.

    Attributes:
        started: when.
        server: its address.
        card: of the model.
        kinds: the mix.
        source: what the inputs were.
        source_count: how many there were.
        source_bytes: mean size of one.
        settings: every option as it was given or defaulted.
        target_seconds: how fast an answer had to be to be good, or None.
        results: what came of each load so far.
        missed: the thresholds that were missed, in words.
        is_complete: False when it was stopped before its end.
    """

    started: dt.datetime
    server: str
    card: ModelCard
    kinds: Sequence[KindOfRequest]
    source: str
    source_count: int
    source_bytes: float
    settings: Mapping[str, Any]
    target_seconds: float | None
    results: list[LoadResult] = dataclasses.field(default_factory=list)
    missed: list[str] = dataclasses.field(default_factory=list)
    is_complete: bool = False


def generator_facts() -> dict[str, Any]:
    """Returns what sent the load: versions and machine."""
    return {
        "camserve": importlib.metadata.version("camserve"),
        "grpcio": importlib.metadata.version("grpcio"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def document(run: Run) -> dict[str, Any]:
    """Returns a run as what `json.dumps` takes."""
    card = run.card
    names = [kind.name for kind in run.kinds]
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "started": run.started.isoformat(timespec="seconds"),
        "is_complete": run.is_complete,
        "generator": generator_facts(),
        "server": {"address": run.server},
        "model": {
            "name": card.name,
            "version": card.version,
            "sha256": card.model_sha256,
            "kind": card.kind,
            "device": card.device,
            "dtype": card.dtype,
            "input_shape": list(card.input.shape),
            "max_batch_rows": card.max_batch_rows,
            "default_layer": card.default_layer,
        },
        "inputs": {"source": run.source, "count": run.source_count, "mean_bytes": run.source_bytes},
        "kinds": [
            {
                "name": kind.name,
                "weight": kind.weight,
                "specs": [{"method": spec.method, "layers": list(spec.layers)} for spec in kind.specs],
            }
            for kind in run.kinds
        ],
        "settings": dict(run.settings),
        "target_seconds": run.target_seconds,
        "steps": [step for result in run.results for step in _steps(result, names)],
        "comparisons": [
            {
                "load": _load(result.load),
                "time_ratio": _of(result.time_ratio),
                "latency_ratio": _of(result.latency_ratio),
            }
            for result in run.results
            if result.prediction is not None
        ],
        "missed": list(run.missed),
    }


def _steps(result: LoadResult, names: Sequence[str]) -> list[dict[str, Any]]:
    made = [_step("mix", result.mix, names)]
    if result.prediction is not None:
        made.append(_step(PREDICTION, result.prediction, [PREDICTION]))
    return made


def _step(asked: str, figures: StepFigures, names: Sequence[str]) -> dict[str, Any]:
    return {
        "asked": asked,
        "load": _load(figures.load),
        "seconds": figures.seconds,
        "is_complete": figures.is_complete,
        "due": figures.due,
        "not_sent": figures.not_sent,
        "answered": figures.answered,
        "good": figures.good,
        "error_share": figures.error_share,
        "errors": _failures(figures.errors),
        "spec_errors": _failures(figures.spec_errors),
        "requests_per_second": figures.requests_per_second,
        "explained_per_second": figures.explained_per_second,
        "maps_per_second": figures.maps_per_second,
        "good_per_second": figures.good_per_second,
        "received_bytes_per_second": figures.received_bytes_per_second,
        "latency_seconds": _of(figures.latency),
        "first_latency_seconds": _of(figures.first_latency),
        "latency_by_kind_seconds": {names[index]: _of(found) for index, found in figures.by_kind.items()},
        "latency_histogram": [dataclasses.asdict(bucket) for bucket in figures.histogram],
        "batch_rows": figures.batch_rows,
        "batch_rows_counts": {str(rows): count for rows, count in figures.batch_rows_counts.items()},
        "stage_seconds": dict(figures.stages),
        "partial_maps": figures.partial_maps,
        "generator_lag_seconds": _of(figures.lag),
        "generator_loop_share": figures.loop_share,
        "is_growing": figures.is_growing,
    }


def _failures(counts: Mapping[Failure, int]) -> list[dict[str, Any]]:
    return [{"code": why.code, "reason": why.reason, "count": count} for why, count in counts.items()]


def _load(load: Load) -> dict[str, Any]:
    if isinstance(load, Closed):
        return {"mode": "closed", "concurrency": load.concurrency}
    return {"mode": "open", "rate": load.rate, "max_in_flight": load.max_in_flight}


def _of(record: Percentiles | Any | None) -> dict[str, Any] | None:
    return None if record is None else dataclasses.asdict(record)

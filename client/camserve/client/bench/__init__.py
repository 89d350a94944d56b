"""The load generator: `camserve bench`, and what is under it for tests and benchmarks.

async with Connections("localhost:50051", count=2) as connections:
    mix = Mix(kinds=(kind("surface", ["grad-cam"], deadline=0.2),), inputs=(input_bytes("part.png"),))
    step = await run_step(connections, mix, Open(rate=50), Window(seconds=10, warm_up_seconds=1))
print(figures_of(step, target_seconds=0.2).good_share, step.records[0].reason)
"""

from __future__ import annotations

from camserve.client.bench.figures import Bucket, Percentiles, StepFigures, figures_of
from camserve.client.bench.load import Connections, Progress, run_step
from camserve.client.bench.mix import Kind, Mix, input_bytes, kind
from camserve.client.bench.records import NOT_SENT, Closed, Failure, Load, Open, Record, Step, Window

__all__ = [
    "NOT_SENT",
    "Bucket",
    "Closed",
    "Connections",
    "Failure",
    "Kind",
    "Load",
    "Mix",
    "Open",
    "Percentiles",
    "Progress",
    "Record",
    "Step",
    "StepFigures",
    "Window",
    "figures_of",
    "input_bytes",
    "kind",
    "run_step",
]

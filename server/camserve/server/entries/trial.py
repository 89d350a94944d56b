"""What one pass of a loaded model takes: time and memory, with and without an explanation, for one row and for a full batch.

`check.py` asks, after the loader has warmed the model up. The inputs are noise of the card's shapes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from camserve.server.engine.batches import make_batch
from camserve.server.engine.high_water import HighWater
from camserve.server.engine.passes import run_pass
from camserve.server.engine.stopwatch import Lap
from camserve.server.jobs import Spec
from camserve.server.models.repository import ServedModel
from camserve.server.models.warm_up import usual_spec

__all__ = ["PassTrial", "try_passes"]

_SEED = 0
_ROUNDS = 2
# What takes longer than this is not repeated.
_LONG_SECONDS = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PassTrial:
    """What one pass took.

    Attributes:
        rows: of the pass.
        method: that explained every row at the default layer; empty for predictions alone.
        seconds: of the device.
        peak_bytes: of memory beyond what the model holds anyway; None where that cannot be told.
    """

    rows: int
    method: str
    seconds: float
    peak_bytes: int | None


def try_passes(served: ServedModel) -> tuple[PassTrial, ...]:
    """Runs predictions alone and with what a caller who names nothing would ask for, at the smallest and the largest batch."""
    card, model = served.card, served.pass_model
    sizes = sorted({card.static_batch_rows or 1, card.static_batch_rows or card.max_batch_rows})
    usual = usual_spec(model, card.default_layer, card.methods)
    return tuple(_tried(served, rows, spec) for rows in sizes for spec in ([None, usual] if usual else [None]))


def _tried(served: ServedModel, rows: int, spec: Spec | None) -> PassTrial:
    model = served.pass_model
    batch, *extras = (make_batch(sample, rows) for sample in _samples(served))
    seconds, peaks = [], []
    for _ in range(_ROUNDS):
        with HighWater(model.program.device) as water, Lap(model.program.device) as lap:
            for _event in run_pass(model, batch, [(spec,) if spec else ()] * rows, extras=extras):
                pass
        seconds.append(lap.seconds)
        peaks.append(water.gained_bytes)
        if lap.seconds > _LONG_SECONDS:
            break
    known = [peak for peak in peaks if peak is not None]
    return PassTrial(
        rows=rows,
        method=spec.method if spec else "",
        seconds=min(seconds),
        peak_bytes=max(known) if known else None,
    )


def _samples(served: ServedModel) -> list[Tensor]:
    """One row of noise for each input; ones where whole numbers are taken, which may be indices."""
    card, program = served.card, served.program
    generator = torch.Generator().manual_seed(_SEED)
    samples = [torch.randn((1, *card.recipe.shape), generator=generator).to(program.device, program.dtype)]
    for extra in card.extra_inputs:
        dtype = getattr(torch, extra.dtype)
        value = torch.randn((1, *extra.shape), generator=generator) if dtype.is_floating_point else None
        held = torch.ones((1, *extra.shape)) if value is None else value
        samples.append(held.to(program.device, dtype if value is None else program.dtype))
    return samples

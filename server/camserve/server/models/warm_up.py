"""The last steps of loading: how the model will be run is chosen, and every kind of pass is run once and timed.

`loader.py` calls these. What leaves is the `PassModel` that serves, and what its passes took, from which the scheduler knows the
first request's cost. Each pass has its turn on the device between those of requests: what it takes there is what it will take.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from torch import Tensor

from camserve.server.cam.methods import METHODS, Layerwise
from camserve.server.engine.batches import make_batch
from camserve.server.engine.look import FAILURES
from camserve.server.engine.pace import ALL_THREADS, MOST_TAIL_ROWS, Pace
from camserve.server.engine.passes import PassModel, run_pass
from camserve.server.engine.plans import Plan, choose_plan, choose_threads
from camserve.server.engine.program import TapName
from camserve.server.engine.stopwatch import Lap
from camserve.server.engine.turns import InTurn, at_once
from camserve.server.jobs import OutputKind, Spec
from camserve.server.models.card import MethodCard
from camserve.server.models.repository import CostSample

__all__ = ["Warmed", "planned", "usual_spec", "warm_up"]

# Trials compare forms and thread counts; on a few rows they come out as on a full pass, and loading takes seconds less.
_TRIAL_ROWS = 4
_STAGE_ROWS = 2
_ROUNDS = 2
# What takes longer than this is not repeated: its first time hides what the first run of anything costs.
_LONG_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """A model that has run.

    Attributes:
        pass_model: with the sizes of amplified chunks.
        costs: of its passes.
    """

    pass_model: PassModel
    costs: tuple[CostSample, ...]


def planned(
    model: PassModel,
    inputs: Sequence[Tensor],
    default_names: Sequence[str],
    *,
    most_threads: int | None,
    in_turn: InTurn = at_once,
) -> tuple[PassModel, Plan]:
    """Chooses the form that serves and the number of threads.

    Args:
        model: the program as loaded.
        inputs: samples of each input, rows first.
        default_names: of the layer at which all forms must explain alike; may be empty.
        most_threads: of one pass on a CPU; 0 for all there are, None leaves their number as it is.
        in_turn: where threads are tried.
    """
    batch = _batch(inputs, model.static_rows or min(_TRIAL_ROWS, model.max_rows))
    plan = choose_plan(model.program, batch, [TapName.parse(name) for name in default_names])
    threads = 0
    if most_threads is not None:
        run = functools.partial(plan.program.run, *batch)
        threads = choose_threads(run, most_threads or ALL_THREADS, model.program.device, in_turn=in_turn)
    return dataclasses.replace(model, program=plan.program, pace=Pace(threads=threads)), plan


def usual_spec(model: PassModel, layer: str, methods: Sequence[MethodCard]) -> Spec | None:
    """What a caller who names nothing would ask for; None where nothing can be asked for without more."""
    # A detector or an embedding has no target without a request.
    has_target = model.kind not in (OutputKind.DETECTION, OutputKind.EMBEDDING)
    works = (METHODS[card.slug] for card in methods if card.works and not card.only_layers)
    usual = (method for method in works if isinstance(method.arithmetic, Layerwise))
    method = next((method for method in usual if method.has_target is has_target), None)
    return None if method is None else Spec(index=0, method=method.slug, layers=(layer,))


def warm_up(
    model: PassModel,
    inputs: Sequence[Tensor],
    spec: Spec | None,
    stages: Sequence[str],
    *,
    slice_seconds: float | None,
    in_turn: InTurn = at_once,
) -> Warmed:
    """Runs the passes that requests will run, so that the first caller pays for nothing, and notes what they take.

    Forward only and with the usual spec at the smallest and the largest size, and a gradient back to each stage at one size.

    Args:
        model: as it will serve.
        inputs: samples of each input, rows first.
        spec: the usual one.
        stages: a layer for each resolution, shallowest first.
        slice_seconds: longest chunk of amplified work; None lets chunks be as large as passes.
        in_turn: where each pass runs.
    """
    timed = functools.partial(_timed, model, inputs, in_turn)
    largest = model.static_rows or model.max_rows
    sizes = sorted({1, largest}) if model.static_rows is None else [largest]
    costs = [timed(rows, wanted) for rows in sizes for wanted in ([None, spec] if spec else [None])]
    if spec is not None:
        rows = model.static_rows or min(_STAGE_ROWS, largest)
        shallower = [layer for layer in stages if model.depths[layer] > 1]
        costs += [timed(rows, dataclasses.replace(spec, layers=(layer,))) for layer in shallower]
    if slice_seconds is not None and model.static_rows is None:
        model = dataclasses.replace(model, pace=_paced(model, inputs, costs, stages, slice_seconds, in_turn))
    return Warmed(pass_model=model, costs=tuple(costs))


def _batch(inputs: Sequence[Tensor], rows: int) -> list[Tensor]:
    return [make_batch(value[:1], rows) for value in inputs]


def _timed(model: PassModel, inputs: Sequence[Tensor], in_turn: InTurn, rows: int, spec: Spec | None) -> CostSample:
    """The shortest of a few passes: the first one of a kind compiles and allocates."""
    run = functools.partial(_pass_seconds, model, _batch(inputs, rows), spec)
    seconds = []
    for _ in range(_ROUNDS):
        seconds.append(in_turn(run))
        if seconds[-1] > _LONG_SECONDS:
            break
    depth = 0 if spec is None else model.depths.get(spec.layers[0], 1)
    return CostSample(depth=depth, rows=rows, seconds=min(seconds))


def _pass_seconds(model: PassModel, inputs: Sequence[Tensor], spec: Spec | None) -> float:
    batch, *extras = inputs
    with Lap(model.program.device) as lap:
        for _event in run_pass(model, batch, [(spec,) if spec else ()] * len(batch), extras=extras):
            pass
    return lap.seconds


def _paced(
    model: PassModel,
    inputs: Sequence[Tensor],
    costs: Sequence[CostSample],
    stages: Sequence[str],
    slice_seconds: float,
    in_turn: InTurn,
) -> Pace:
    """Chunks that fill the slice, or one row where that takes longer; where a full pass fits, chunks are as large as passes."""
    forwards = {cost.rows: cost.seconds for cost in costs if cost.depth == 0}
    if max(forwards.values()) <= slice_seconds:
        return model.pace
    chunk_rows = _rows_within(slice_seconds, forwards, model.max_rows)
    of_stage = {layer: in_turn(functools.partial(_tail_rows, model, inputs, layer, slice_seconds)) for layer in stages}
    tail_rows = {}
    for layer, depth in model.depths.items():
        # Behind a layer inside a stage lies more than behind the end of that stage, and less than behind the one before it.
        ends = [stage for stage in stages if model.depths[stage] == depth + (layer not in of_stage)]
        tail_rows[layer] = max(chunk_rows, of_stage[ends[0]]) if ends else chunk_rows
    return dataclasses.replace(model.pace, chunk_rows=chunk_rows, tail_rows=tail_rows)


def _rows_within(slice_seconds: float, seconds: Mapping[int, float], most: int) -> int:
    """The largest power of two, or `most`, of rows that take no longer than the slice; at least one.

    Args:
        slice_seconds: the slice.
        seconds: measured, by rows.
        most: rows allowed.
    """
    smallest, largest = min(seconds), max(seconds)
    more = max(0.0, seconds[largest] - seconds[smallest]) / max(1, largest - smallest)
    sizes = [most, *(2**power for power in reversed(range(most.bit_length())))]
    fits = (rows for rows in sizes if rows <= most and seconds[smallest] + more * (rows - smallest) <= slice_seconds)
    return next(fits, 1)


def _tail_rows(model: PassModel, inputs: Sequence[Tensor], layer: str, slice_seconds: float) -> int:
    """How many activations can be tried behind a layer within the slice."""
    try:
        cut = model.program.cut(TapName.parse(layer))
        seconds = {}
        for rows in (1, _TRIAL_ROWS):
            activation, crossing = cut.front(*_batch(inputs, rows))
            laps = []
            for _ in range(_ROUNDS):
                with Lap(model.program.device) as lap:
                    cut.tail(activation, crossing)
                laps.append(lap.seconds)
            seconds[rows] = min(laps)
            if rows == 1 and 2 * seconds[rows] > slice_seconds:
                return 1
    except FAILURES:
        return 1  # It cannot be cut there: methods that would are refused, or run the whole program.
    return _rows_within(slice_seconds, seconds, MOST_TAIL_ROWS)

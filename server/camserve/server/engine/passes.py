"""The shared pass: one forward and as few gradients as the requests allow, for rows that want different things.

A batch arrives with the specs of each row. What leaves, one by one, are `Forwarded` (what the model said of every row, before any
gradient is computed, so that the runner can send predictions), a `Mapped` for every map or failed spec, an `Amplification` for
every spec that goes on working on its row alone, and `Closed` with what it took. The runner calls this on the device thread;
nothing here knows of requests, deadlines or memory limits.

The r-th gradient is that of the sum, over the rows, of each row's r-th distinct aim. As no row influences another's score, that
gives each row its own gradient: as many backward passes as the most demanding row has aims, and one for most batches.

At equal batch size a row's map has the same bits whatever its neighbours ask for. Hence every operation on the device sees either
the whole batch or one row, never a group whose size depends on the company.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods import Need
from camserve.server.engine.aiming import Aimer
from camserve.server.engine.amplification import Amplification
from camserve.server.engine.compiled_pass import compiled_graph
from camserve.server.engine.evidence import Differentiated
from camserve.server.engine.further import FurtherForwards, rules_of
from camserve.server.engine.graph import Chosen, Gradients, PassGraph, capture_graph, moved
from camserve.server.engine.mapping import Mapper
from camserve.server.engine.pace import use_threads
from camserve.server.engine.plan import Ask, Failure, PassModel, check, distinct_aims, settle
from camserve.server.engine.program import INPUT, BackwardRule, TapName
from camserve.server.engine.stopwatch import Lap
from camserve.server.errors import CamserveError
from camserve.server.jobs import RawMap, Reading, Spec, SpecFailed

__all__ = ["Amplification", "Closed", "Forwarded", "Mapped", "PassModel", "run_pass"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forwarded:
    """The forward is done.

    Attributes:
        readings: what the model said of each row.
        finite: (b) whether all of a row's numbers are; the specs of other rows fail.
        forward_seconds: device time, with the copy of the outputs.
        is_compiled: whether it ran on the compiled plan.
    """

    readings: tuple[Reading, ...]
    finite: npt.NDArray[np.bool_]
    forward_seconds: float
    is_compiled: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """One map of one spec, or the spec's failure, after which no more of it comes.

    Attributes:
        row: place in the batch.
        result: the map; a spec with several targets gives `result.target.count` of them, other maps may come between.
    """

    row: int
    result: RawMap | SpecFailed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Nothing more comes.

    Attributes:
        forward_seconds: device time of the forward.
        backward_seconds: of all gradients, and of further forwards under other rules.
        map_seconds: of making the maps.
        explanations: specs that shared the pass, over the rows that were wanted at its start; without those that were not due.
        is_compiled: whether it ran on the compiled plan; the gradient's time is then in the forward's.
    """

    forward_seconds: float
    backward_seconds: float
    map_seconds: float
    explanations: int
    is_compiled: bool = False


IsWanted: TypeAlias = Callable[[int], bool]
IsDue: TypeAlias = Callable[[int, int, Reading], bool]
Event: TypeAlias = Forwarded | Mapped | Amplification | Closed


def run_pass(
    model: PassModel,
    batch: Float[Tensor, "b *input"],
    rows: Sequence[tuple[Spec, ...]],
    *,
    extras: Sequence[Tensor] = (),
    is_wanted: IsWanted = lambda _row: True,
    is_due: IsDue = lambda _row, _spec_index, _reading: True,
) -> Iterator[Event]:
    """Runs one batch and yields what each row asked for, as soon as it is there.

    `Forwarded` comes first, unless no row is wanted any more; then the failures known by now, the maps that need no gradient,
    those of each gradient in turn, and the work of amplified specs, not yet begun; `Closed` comes last. Within each step
    rows come in order, and specs in the order of their row. A spec that cannot be made is a `Mapped` with a `SpecFailed` and
    touches no other. No gradient is accumulated anywhere: the program is left as it was.

    Args:
        model: what runs.
        batch: one input for each row; moved to the program's device and floating dtype.
        rows: the specs of each row; none for a row that only wants its prediction.
        extras: further inputs of the model in the order of its arguments, one row for each row.
        is_wanted: whether somebody still waits for a row; asked before the forward, before each gradient and before each map.
        is_due: whether a spec of a row, by its index, is to be made after all, now that the model has spoken; asked once for
            each, behind the forward, which was tapped for all of them, and before any gradient. Nothing more is done for one
            that is not. May raise a CamserveError, with which the spec then fails.

    Raises:
        ValueError: `rows` is not as long as the batch.
        ExecutionFailed: the model's output holds nothing of its kind at `output_path`, or another number of classes than the card
            says.
        RuntimeError: the model's forward failed, or memory ran out.
    """
    if len(rows) != len(batch):
        raise ValueError(f"{len(rows)} rows of specs for a batch of {len(batch)}")
    wanted = [row for row in range(len(rows)) if is_wanted(row)]
    if not wanted:
        yield Closed(forward_seconds=0.0, backward_seconds=0.0, map_seconds=0.0, explanations=0)
        return
    device = model.program.device
    use_threads(model.pace.threads)
    inputs = [moved(model, value) for value in (batch, *extras)]
    asks, failures = check(model, [(row, spec) for row in wanted for spec in rows[row]])
    with Lap(device) as forward:
        compiled = compiled_graph(model, inputs[0], [specs if row in wanted else () for row, specs in enumerate(rows)])
        graph, refusals = _forward(model, inputs, asks) if compiled is None else (compiled, {})
        readings = tuple(graph.readout().readings())
    is_finite = np.asarray([_is_finite(reading) for reading in readings])
    is_compiled = compiled is not None
    yield Forwarded(readings=readings, finite=is_finite, forward_seconds=forward.seconds, is_compiled=is_compiled)

    usable = [bool(finite) for finite in is_finite]
    asks, failures = _due(asks, failures, readings, usable, is_due)
    explanations = len(asks) + len(failures)
    asks, more_failures = settle(asks, refusals, Aimer(model, graph), usable, model.max_maps)
    for failure in failures + more_failures:
        if is_wanted(failure.row):
            yield Mapped(row=failure.row, result=failure.spec_failed)
    shared = [ask for ask in asks if not ask.is_amplified]
    mapper = Mapper(model, graph.detached_activations(), distinct_aims(shared, len(rows)))
    work = _SharedWork(graph, FurtherForwards(model, inputs), mapper, is_wanted)
    if not any(ask.needs_gradient for ask in shared):
        graph.release()
    yield from work.without_gradient([ask for ask in shared if not ask.needs_gradient])
    yield from work.with_gradients([ask for ask in shared if ask.needs_gradient])
    for ask in asks:
        if ask.is_amplified and is_wanted(ask.row):
            # Copies: the batch goes with the pass, the work may stay long.
            yield Amplification(model, ask, [value[ask.row : ask.row + 1].clone() for value in inputs])
    yield Closed(
        forward_seconds=forward.seconds,
        backward_seconds=sum(lap.seconds for lap in work.laps),
        map_seconds=mapper.seconds,
        explanations=explanations,
        is_compiled=is_compiled,
    )


class _SharedWork:
    """What the specs of a batch share after its forward.

    Attributes:
        laps: time spent on gradients, and on forwards under other rules.
    """

    def __init__(self, graph: PassGraph, further: FurtherForwards, mapper: Mapper, is_wanted: IsWanted) -> None:
        self.laps: list[Lap] = []
        self._graph = graph
        self._further = further
        self._mapper = mapper
        self._is_wanted = is_wanted

    def without_gradient(self, asks: Sequence[Ask]) -> Iterator[Mapped]:
        """The maps that need nothing but activations."""
        refused, ready = self._prepared(asks)
        yield from refused
        yield from self._maps(ready, None, {})

    def with_gradients(self, asks: Sequence[Ask]) -> Iterator[Mapped]:
        """The maps of each gradient in turn; the graph is freed behind the last."""
        refused, ready = self._prepared(asks)
        yield from refused
        last = max((rank for ask in ready for rank in self._mapper.ranks(ask)), default=-1)
        for rank, chosen, sharing in self._steps(ready, last):
            with self._lap():
                found = _differentiate(self._graph, self._further, chosen, sharing)
            if rank == last:
                self._release()  # Maps are encoded while the rest of this runs, and need the memory.
            self._mapper.next_rank()
            yield from self._maps(sharing, rank, found)
        self._release()

    def _prepared(self, asks: Sequence[Ask]) -> tuple[list[Mapped], list[Ask]]:
        """Runs the forwards these need under other rules; returns what the program refused, and who can go on."""
        refused, ready = [], []
        with self._lap():
            for ask in asks:
                error = self._further.refusal(ask)
                if error is None:
                    ready.append(ask)
                else:
                    refused.append(Mapped(row=ask.row, result=self._mapper.fail(ask, error)))
        self._mapper.add(self._further.attentions())
        return refused, ready

    def _lap(self) -> Lap:
        lap = Lap(self._graph.device)
        self.laps.append(lap)
        return lap

    def _steps(self, asks: Sequence[Ask], last: int) -> Iterator[tuple[int, list[Chosen | None], list[Ask]]]:
        """Yields each gradient that is still wanted: its rank, every row's aim in it, and the asks that share it."""
        for rank in range(last + 1):
            sharing = [
                ask
                for ask in asks
                if rank in self._mapper.ranks(ask) and not self._mapper.has_failed(ask) and self._is_wanted(ask.row)
            ]
            if sharing:
                rows = {ask.row for ask in sharing}
                yield (
                    rank,
                    [self._mapper.chosen(row, rank) if row in rows else None for row in self._mapper.rows],
                    sharing,
                )

    def _maps(self, asks: Iterable[Ask], only_rank: int | None, found: Differentiated) -> Iterator[Mapped]:
        """Yields the maps of `asks` whose aim has the given rank, or all of them for None."""
        for ask in asks:
            for aim, rank in zip(ask.aims, self._mapper.ranks(ask), strict=True):
                if only_rank in (None, rank) and not self._mapper.has_failed(ask) and self._is_wanted(ask.row):
                    yield Mapped(row=ask.row, result=self._mapper.map(ask, aim, rank, found))

    def _release(self) -> None:
        self._graph.release()
        self._further.release()


def _due(
    asks: Sequence[Ask], failures: Sequence[Failure], readings: Sequence[Reading], usable: Sequence[bool], is_due: IsDue
) -> tuple[list[Ask], list[Failure]]:
    """What is left of both when only specs that are due count; of a row without a reading all are."""

    def look(row: int, spec_index: int) -> bool:
        try:
            return not usable[row] or is_due(row, spec_index, readings[row])
        except CamserveError as error:
            found.append(Failure(row=row, spec_failed=SpecFailed(spec_index=spec_index, error=error)))
            return False

    found: list[Failure] = []
    due = [ask for ask in asks if look(ask.row, ask.spec.index)]
    left = [failure for failure in failures if look(failure.row, failure.spec_failed.spec_index)]
    return due, left + found


def _is_finite(reading: Reading) -> bool:
    return bool(np.isfinite(reading.scores).all())


def _forward(
    model: PassModel, inputs: Sequence[Tensor], asks: Sequence[Ask]
) -> tuple[PassGraph, dict[TapName, CamserveError]]:
    """Runs the batch once, tapped for all asks that share it under the plain rule."""
    sharing = [ask for ask in asks if not ask.is_amplified and ask.rule is BackwardRule.PLAIN]
    taps = list(dict.fromkeys(tap for ask in sharing for tap in ask.taps))
    # A guided gradient is taken in a forward of its own; nothing here need reach back to the input for it.
    needs_input = any(INPUT in ask.taps and Need.GRADIENT in ask.method.needs for ask in sharing)
    if INPUT in taps and not needs_input:
        taps.remove(INPUT)
    differentiable = any(ask.method.needs & {Need.GRADIENT, Need.CURVATURE} for ask in sharing)
    graph, refusals = capture_graph(model, inputs, taps, differentiable=differentiable)
    if not needs_input:
        graph.activations = {**graph.activations, INPUT: inputs[0]}
    return graph, refusals


def _differentiate(
    graph: PassGraph, further: FurtherForwards, chosen: Sequence[Chosen | None], sharing: Sequence[Ask]
) -> Differentiated:
    """All gradients that the asks of one rank need."""
    found: dict[BackwardRule | str, Gradients] = {}
    plain = [ask for ask in sharing if Need.GRADIENT in ask.method.needs and ask.rule is BackwardRule.PLAIN]
    if plain:
        found[BackwardRule.PLAIN] = graph.gradients(chosen, _distinct_taps(plain))
    curved = [ask for ask in sharing if Need.CURVATURE in ask.method.needs]
    if curved:
        found["curvature"] = graph.curvatures(chosen, _distinct_taps(curved))
    for rule in dict.fromkeys(rule for ask in sharing for rule in rules_of(ask)):
        found[rule] = further.gradients(rule, chosen)
    return found


def _distinct_taps(asks: Sequence[Ask]) -> list[TapName]:
    return list(dict.fromkeys(tap for ask in asks for tap in ask.taps))

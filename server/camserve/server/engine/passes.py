"""The shared pass: one forward and as few gradients as the requests allow, for rows that want different things.

A batch arrives with the specs of each row. What leaves, one by one, are `Forwarded` (every row's logits, before any gradient is
computed, so that the runner can send predictions), a `Mapped` for every map or failed spec, and `Closed` with what it took. The
runner calls this on the device thread; nothing here knows of requests, deadlines or memory limits.

The r-th gradient is that of the sum, over the rows, of each row's r-th distinct target. Since no row influences another's score,
that gives each row its own gradient: as many backward passes as the most demanding row has targets, and one for most batches.

At equal batch size a row's map has the same bits whatever its neighbours ask for. Hence every operation on the device sees either
the whole batch or one row, never a group whose size depends on the company.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.engine.mapping import Gradients, Mapper, is_device_failure
from camserve.server.engine.plan import Ask, PassModel, check, distinct_targets, settle
from camserve.server.engine.program import Capture, Program, TapName
from camserve.server.engine.stopwatch import Lap
from camserve.server.engine.targets import scores, select_output
from camserve.server.errors import CamserveError, ExecutionFailed, Reason, Unsupported
from camserve.server.jobs import FloatArray, RawMap, ResolvedTarget, Spec, SpecFailed

__all__ = ["Closed", "Forwarded", "Mapped", "PassModel", "run_pass"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """The forward is done.

    Attributes:
        logits: (b, classes) float32.
        finite: (b) whether all of a row's logits are; the specs of other rows fail.
        forward_seconds: device time, with the copy of the logits.
    """

    logits: FloatArray
    finite: npt.NDArray[np.bool_]
    forward_seconds: float


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
        backward_seconds: of all gradients.
        map_seconds: of making the maps.
        explanations: specs that shared the pass, over the rows that were wanted at its start.
    """

    forward_seconds: float
    backward_seconds: float
    map_seconds: float
    explanations: int


IsWanted: TypeAlias = Callable[[int], bool]


def run_pass(
    model: PassModel,
    batch: Float[Tensor, "b *input"],
    rows: Sequence[tuple[Spec, ...]],
    *,
    is_wanted: IsWanted = lambda _row: True,
) -> Iterator[Forwarded | Mapped | Closed]:
    """Runs one batch and yields what each row asked for, as soon as it is there.

    `Forwarded` comes first, unless no row is wanted any more; then the failures known by now, the maps that need no gradient, and
    those of each gradient in turn; `Closed` comes last. Within each of these steps rows come in order, and specs in the order of
    their row. A spec that cannot be made is a `Mapped` with a `SpecFailed` and touches no other. No gradient is accumulated
    anywhere: the program is left as it was.

    Args:
        model: what runs.
        batch: one input for each row; moved to the program's device and floating dtype.
        rows: the specs of each row; none for a row that only wants its prediction.
        is_wanted: whether somebody still waits for a row; asked before the forward, before each gradient and before each map.

    Raises:
        ValueError: `rows` is not as long as the batch.
        ExecutionFailed: the model's output holds no class logits at `output_path`, or another number of them than the batch and
            the card say.
        RuntimeError: the model's forward failed, or memory ran out.
    """
    if len(rows) != len(batch):
        raise ValueError(f"{len(rows)} rows of specs for a batch of {len(batch)}")
    wanted = [row for row in range(len(rows)) if is_wanted(row)]
    if not wanted:
        yield Closed(forward_seconds=0.0, backward_seconds=0.0, map_seconds=0.0, explanations=0)
        return
    device = model.program.device
    asks, failures = check(model, [(row, spec) for row in wanted for spec in rows[row]])
    with Lap(device) as forward:
        graph, refusals = _forward(model, batch, asks)
        # float64 stays, so that close classes are ranked as the model has them.
        logits = graph.logits.detach().to("cpu", torch.promote_types(graph.logits.dtype, torch.float32)).numpy()
    float_logits = logits.astype(np.float32)
    is_finite = np.asarray(np.isfinite(float_logits).all(axis=1))
    yield Forwarded(logits=float_logits, finite=is_finite, forward_seconds=forward.seconds)

    asks, more_failures = settle(asks, refusals, logits)
    for failure in failures + more_failures:
        if is_wanted(failure.row):
            yield Mapped(row=failure.row, result=failure.spec_failed)
    mapper = Mapper(model, graph.detached_activations(), distinct_targets(asks, len(rows)))
    last = max((rank for ask in asks if ask.needs_gradient for rank in mapper.ranks(ask)), default=None)
    if last is None:
        graph.release()
    yield from _maps(mapper, [ask for ask in asks if not ask.needs_gradient], None, {}, is_wanted)
    backward = []
    for rank, chosen, sharing in _gradient_steps(mapper, asks, is_wanted):
        with Lap(device) as lap:
            gradients = graph.gradients(chosen, list(dict.fromkeys(tap for ask in sharing for tap in ask.taps)))
        backward.append(lap)
        if rank == last:
            graph.release()  # Maps are encoded while the rest of this runs, and need the memory.
        mapper.next_rank()
        yield from _maps(mapper, sharing, rank, gradients, is_wanted)
    yield Closed(
        forward_seconds=forward.seconds,
        backward_seconds=sum(lap.seconds for lap in backward),
        map_seconds=mapper.seconds,
        explanations=sum(len(rows[row]) for row in wanted),
    )


def _forward(model: PassModel, batch: Tensor, asks: Sequence[Ask]) -> tuple[_Graph, dict[TapName, CamserveError]]:
    """Runs the batch once, tapped for all asks; returns the taps that were refused beside what could be had."""
    program = model.program
    inputs = batch.to(program.device, program.dtype if batch.is_floating_point() else batch.dtype)
    taps = list(dict.fromkeys(tap for ask in asks for tap in ask.taps))
    differentiable = any(ask.needs_gradient for ask in asks)
    captured, refusals = _capture(program, taps, inputs, differentiable=differentiable)
    logits = select_output(captured.outputs, model.output_path)
    if tuple(logits.shape) != (len(batch), model.classes):
        raise ExecutionFailed(
            Reason.MODEL_FAILED,
            f"the model returned logits of shape {tuple(logits.shape)}, not {(len(batch), model.classes)}",
            metadata={"shape": tuple(logits.shape), "rows": len(batch), "classes": model.classes},
        )
    return _Graph(logits, captured.activations), refusals


def _capture(
    program: Program, taps: Sequence[TapName], inputs: Tensor, *, differentiable: bool
) -> tuple[Capture, dict[TapName, CamserveError]]:
    """Captures all taps or, if the program refuses, those that it takes one at a time.

    A refusal names one tap, and there may be more. Validation lets few through, so the extra forwards hardly ever run.
    """
    if not taps:
        return Capture(outputs=program.run(inputs), activations={}), {}
    try:
        return program.capture(taps, inputs, differentiable=differentiable), {}
    except CamserveError as error:
        refusals = {taps[0]: error}
    if len(taps) > 1:
        refusals = {}
        for tap in taps:
            try:
                program.capture([tap], inputs, differentiable=False)
            except CamserveError as error:
                refusals[tap] = error
    accepted = [tap for tap in taps if tap not in refusals]
    if len(accepted) == len(taps):
        raise ExecutionFailed(Reason.MODEL_FAILED, "the model takes each of the layers alone but not together")
    captured, _ = _capture(program, accepted, inputs, differentiable=differentiable)
    return captured, refusals


class _Graph:
    """What a tapped forward left: logits that can be differentiated with respect to each activation, any number of times."""

    def __init__(self, logits: Tensor, activations: Mapping[TapName, Tensor]) -> None:
        self.logits = logits
        self._activations = activations

    def release(self) -> None:
        """Frees the graph. Nothing can be differentiated afterwards; detached activations stay with whoever has them."""
        self.logits = self.logits.detach()
        self._activations = {}

    def detached_activations(self) -> dict[TapName, Tensor]:
        return {tap: value.detach() for tap, value in self._activations.items()}

    def gradients(self, chosen: Sequence[ResolvedTarget | None], taps: Sequence[TapName]) -> Gradients:
        """Differentiates the sum of every row's chosen score; one backward pass, unless an operator has no derivative.

        Returns:
            For each tap the gradient, None where the score does not depend on it, or why it cannot be differentiated.
        """
        if not self.logits.requires_grad:
            return dict.fromkeys(taps)
        with torch.enable_grad():
            total = scores(self.logits, chosen).sum()
        activations = [self._activations[tap] for tap in taps]
        try:
            found = torch.autograd.grad(total, activations, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if is_device_failure(error):
                raise
            if len(taps) == 1:
                return {taps[0]: _no_derivative(taps[0], error)}
        else:
            return dict(zip(taps, found, strict=True))
        # One layer before an operator without a derivative must not take down those behind it.
        return {tap: gradient for alone in taps for tap, gradient in self.gradients(chosen, [alone]).items()}


def _no_derivative(tap: TapName, error: RuntimeError) -> CamserveError:
    return Unsupported(
        Reason.TARGET_NOT_DIFFERENTIABLE,
        f"an operator between layer '{tap}' and the class scores has no derivative; choose a later layer ({error})",
        metadata={"layer": tap},
    )


def _gradient_steps(
    mapper: Mapper, asks: Sequence[Ask], is_wanted: IsWanted
) -> Iterator[tuple[int, list[ResolvedTarget | None], list[Ask]]]:
    """Yields each gradient that is still wanted: its rank, the target of every row in it, and the asks that share it."""
    for rank in range(max(map(len, mapper.targets), default=0)):
        sharing = [
            ask
            for ask in asks
            if ask.needs_gradient and rank in mapper.ranks(ask) and not mapper.has_failed(ask) and is_wanted(ask.row)
        ]
        if sharing:
            rows = {ask.row for ask in sharing}
            yield rank, [targets[rank] if row in rows else None for row, targets in enumerate(mapper.targets)], sharing


def _maps(
    mapper: Mapper, asks: Iterable[Ask], only_rank: int | None, gradients: Gradients, is_wanted: IsWanted
) -> Iterator[Mapped]:
    """Yields the maps of `asks` whose target has the given rank, or all of them for None."""
    for ask in asks:
        for target, rank in zip(ask.targets, mapper.ranks(ask), strict=True):
            if only_rank in (None, rank) and not mapper.has_failed(ask) and is_wanted(ask.row):
                yield Mapped(row=ask.row, result=mapper.map(ask, target, rank, gradients))

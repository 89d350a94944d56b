"""Chooses, right after loading, how a program is run: in which form, and on how many threads.

The loader calls `choose_plan` once the probe knows the layers. A rewritten form serves if it passes its trial against the program
as loaded: same outputs, same activation and gradient at the default layer, to rounding, and not slower. Forms differ in their
last bits; so the choice follows from the program and the kind of device, and the clock can only speak against it. It is told on
the card.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from camserve.server.engine.alike import TOLERANCE, correlation, difference, least_correlation
from camserve.server.engine.look import FAILURES
from camserve.server.engine.planned import PlannedProgram, Rewritable
from camserve.server.engine.program import Program, TapName
from camserve.server.engine.stopwatch import Lap
from camserve.server.engine.turns import InTurn, at_once

__all__ = ["Plan", "choose_plan", "choose_threads"]

# Weights of convolutions times cells of the input, by 1024 as most layers see them: below this a forward is mostly the launching
# of operators, and not worth a second copy of the weights. By size and not by the clock, so that the next start chooses alike.
_WORTHWHILE_WORK: Final = 2e7
_CELLS: Final = 1024
# A form is refused if it is clearly slower; that it be clearly faster is not asked, or the choice would follow the noise.
_LEAST_SPEEDUP: Final = 0.9
# Fewer threads must gain more: at load the other cores may be busy with something that will be over when requests come.
_LEAST_THREAD_GAIN: Final = 1.2
# Work shorter than this on one thread waits longer for other threads than they save it.
_WORTH_THREADS_SECONDS: Final = 0.004
_ROUNDS: Final = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a program is run.

    Attributes:
        program: what passes use.
        name: such as `folded, channels last`, or `as loaded`.
        speedup: of a forward over the program as loaded; 1 for that itself.
        deviation: largest difference of an output from the program as loaded, relative to the largest output.
    """

    program: Program
    name: str = "as loaded"
    speedup: float = 1.0
    deviation: float = 0.0


def choose_plan(program: Program, inputs: Sequence[Tensor], default: Sequence[TapName]) -> Plan:
    """Tries the rewritten forms of a program.

    Args:
        program: as loaded, and looked at by the probe.
        inputs: as many rows as a full pass will have.
        default: names of the default layer, whose activation and gradient are compared too; none where there is none.
    """
    as_loaded = Plan(program=program)
    if _work(program, inputs[0]) < _WORTHWHILE_WORK:
        return as_loaded
    expected = program.run(*inputs)
    # Of either layout only one is tried: channels last is what convolutions of two axes like on every device.
    is_image = inputs[0].ndim == 4
    for channels_last in (True, False) if is_image else (False,):
        planned = _rewritten(program, inputs, channels_last=channels_last)
        name = "folded, channels last" if channels_last else "folded"
        plan = None if planned is None else _tried(program, planned, name, inputs, default, expected)
        if planned is not None and plan is not None:
            return _fused(program, planned, plan, inputs, default, expected)
    return as_loaded


def _work(program: Program, batch: Tensor) -> float:
    """A measure of a row's forward that is the same on every machine."""
    weights = sum(tensor.numel() for tensor in program.tensors().values() if tensor.ndim >= 3)
    return weights * math.prod(batch.shape[2:]) / _CELLS


def _tried(
    program: Program,
    planned: PlannedProgram,
    name: str,
    inputs: Sequence[Tensor],
    default: Sequence[TapName],
    expected: Any,
) -> Plan | None:
    """The plan, if a form computes what the program does and is not slower."""
    deviation = _deviation(planned, inputs, expected)
    if deviation > TOLERANCE[program.dtype] or not _explains_alike(program, planned, inputs, default):
        return None
    speedup = _speedup(program, planned, inputs)
    return Plan(program=planned, name=name, speedup=speedup, deviation=deviation) if speedup >= _LEAST_SPEEDUP else None


def _fused(
    program: Program,
    planned: PlannedProgram,
    plan: Plan,
    inputs: Sequence[Tensor],
    default: Sequence[TapName],
    expected: Any,
) -> Plan:
    """The same with its front fused up to the default layer, where that can be done."""
    try:
        cut = planned.rewritten.fused(default[0]) if default and planned.rewritten.keeps(default[0]) else None
        if cut is None:
            return plan
        fused = PlannedProgram(
            program, planned.rewritten, is_channels_last=planned.is_channels_last, fused=cut, fused_at=default
        )
        tried = _tried(program, fused, f"{plan.name}, fused up to {default[0]}", inputs, default, expected)
    except FAILURES:
        return plan
    if tried is None or _speedup(planned, fused, inputs) < _LEAST_SPEEDUP:
        return plan
    return tried


def choose_threads(run: Callable[[], object], most: int, device: torch.device, *, in_turn: InTurn = at_once) -> int:
    """How many threads a pass should use: all that are allowed, unless fewer are clearly faster.

    Args:
        run: a forward.
        most: threads allowed.
        device: where it runs; anything but a CPU needs one.
        in_turn: where the forwards are timed; a few of them are one piece of work.
    """
    if device.type != "cpu" or most == 1:
        return 1
    if in_turn(functools.partial(_shortest_on, 1, run, device)) < _WORTH_THREADS_SECONDS:
        return 1
    chosen, fastest = most, float("inf")
    for threads in sorted({most, *(2**power for power in range(most.bit_length()))}, reverse=True):
        seconds = in_turn(functools.partial(_shortest_on, threads, run, device))
        if seconds * _LEAST_THREAD_GAIN < fastest:
            chosen, fastest = threads, seconds
    return chosen


def _shortest_on(threads: int, run: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs on so many threads, of which the thread that this runs in has its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run()
        return _shortest(run, device)
    finally:
        torch.set_num_threads(before)


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    return min(_seconds(run, device) for _ in range(_ROUNDS))


def _rewritten(program: Program, inputs: Sequence[Tensor], *, channels_last: bool) -> PlannedProgram | None:
    """The rewritten form; None where there is none, or it does not run."""
    try:
        form = cast("Rewritable", program).rewritten(inputs, channels_last=channels_last)
    except FAILURES:
        return None
    return None if form is None else PlannedProgram(program, form, is_channels_last=channels_last)


def _deviation(planned: Program, inputs: Sequence[Tensor], expected: Any) -> float:
    """Largest difference of any output, relative to the largest value of that output; infinity if they are not alike."""
    try:
        found = planned.run(*inputs)
    except FAILURES:
        return float("inf")
    ours, theirs = (pytree.tree_flatten(value) for value in (found, expected))
    if ours[1] != theirs[1]:
        return float("inf")
    return max((_difference(one, other) for one, other in zip(ours[0], theirs[0], strict=True)), default=0.0)


def _difference(one: Any, other: Any) -> float:
    if not isinstance(other, Tensor):
        return 0.0 if one == other else float("inf")
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return float("inf")
    if not other.numel():
        return 0.0
    if not other.is_floating_point():
        return 0.0 if torch.equal(one, other) else float("inf")
    return difference(one, other)


def _explains_alike(program: Program, planned: Program, inputs: Sequence[Tensor], default: Sequence[TapName]) -> bool:
    """Whether activation and gradient at the default layer are those of the program as loaded, as pictures."""
    if not default:
        return True
    tap = default[0]
    least = least_correlation(program.dtype)
    try:
        pairs = zip(_evidence(program, inputs, tap), _evidence(planned, inputs, tap), strict=True)
        return all(correlation(one, other) >= least for one, other in pairs)
    except FAILURES:
        return False


def _evidence(program: Program, inputs: Sequence[Tensor], tap: TapName) -> list[Tensor]:
    """The activation and, where there is one, the gradient of the sum of each row's largest output."""
    captured = program.capture([tap], *inputs)
    activation = captured.activations[tap]
    floating = [
        leaf for leaf in pytree.tree_leaves(captured.outputs) if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if not floating:
        return [activation.detach()]
    with torch.enable_grad():
        total = floating[0].flatten(1).amax(1).sum() if floating[0].ndim > 1 else floating[0].sum()
        (gradient,) = torch.autograd.grad(total, [activation], allow_unused=True)
    return [activation.detach()] if gradient is None else [activation.detach(), gradient]


def _speedup(slow: Program, fast: Program, inputs: Sequence[Tensor]) -> float:
    """Ratio of the shortest forwards; both take turns, and what a noisy machine adds is left out."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for program, into in zip((slow, fast), seconds, strict=True):
            into.append(_own_seconds(functools.partial(program.run, *inputs), program.device))
    return min(seconds[0]) / min(seconds[1])


def _own_seconds(run: Callable[[], object], device: torch.device) -> float:
    """What a run takes without the time in which other programs have this core."""
    if device.type != "cpu":
        return _seconds(run, device)
    started = time.thread_time()
    run()
    return time.thread_time() - started


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    with Lap(device) as lap:
        run()
    return lap.seconds

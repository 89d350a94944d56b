"""The last look at a model before it serves: does it explain, as it will be served, what the model as loaded explains?

`loader.py` calls it behind the warm-up. What serves is fused, folded and differentiated only as far back as a tap; the reference
is the program as it was loaded, differentiated from its input on, by plain autograd. What differs is refused with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camserve.server.engine.alike import TOLERANCE, correlation, difference, least_correlation
from camserve.server.engine.batches import make_batch
from camserve.server.engine.passes import Forwarded, Mapped, PassModel, run_pass
from camserve.server.engine.program import BackwardRule, Capture, Program, TapName
from camserve.server.jobs import ClassIndex, OutputKind, RawMap, Reading, Spec, SpecFailed, Target

__all__ = ["self_test"]

_ROWS = 2
_CLASSIFIERS = (OutputKind.CLASSIFICATION, OutputKind.MULTI_LABEL)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    reading: Reading
    result: RawMap | SpecFailed | None


def self_test(model: PassModel, as_loaded: Program, inputs: Sequence[Tensor], spec: Spec | None, layer: str) -> str:
    """Explains one row both ways.

    Args:
        model: as it will serve.
        as_loaded: the program that it was made from.
        inputs: samples of each input, rows first.
        spec: the usual explanation; None for models that need to be told what to explain, whose default layer is read only.
        layer: the default one.

    Returns:
        What was found, for the card.

    Raises:
        ValueError: the two differ, or the layer cannot be read.
    """
    if spec is None:
        _read(model, inputs, layer)
        return f"self-test: {layer!r} can be read"
    reference = dataclasses.replace(model, program=_Whole(as_loaded), compiled=None)
    alone = _answer(reference, inputs, spec, model.static_rows or 1)
    if model.kind in _CLASSIFIERS:
        # Of two classes that are nearly equal, rounding may put either first.
        best = int(np.argmax(alone.reading.scores))
        spec = dataclasses.replace(spec, target=Target(about=ClassIndex(best)))
        alone = _answer(reference, inputs, spec, model.static_rows or 1)
    served = _answer(model, inputs, spec, model.static_rows or min(_ROWS, model.max_rows))
    if refusal := _same_refusal(served, alone):
        _check_scores(served, alone, TOLERANCE[model.program.dtype])
        _read(model, inputs, layer)
        return f"self-test: {layer!r} can be read, but as in the model as loaded {refusal}"
    return _compared(served, alone, model.program.dtype, spec)


def _same_refusal(served: _Answer, reference: _Answer) -> str:
    """Why neither has a map, where that is the model's own nature, such as a head that hands no gradient on; else empty."""
    ours, theirs = served.result, reference.result
    if isinstance(ours, SpecFailed) and isinstance(theirs, SpecFailed) and ours.error.reason == theirs.error.reason:
        return theirs.error.message
    return ""


def _check_scores(served: _Answer, reference: _Answer, allowed: float) -> None:
    """Raises ValueError where they are not alike."""
    scores = (torch.from_numpy(np.asarray(answer.reading.scores)) for answer in (served, reference))
    deviation = difference(*scores) if reference.reading.scores.size else 0.0
    if deviation > allowed:
        raise ValueError(
            f"self-test: scores differ from those of the model as loaded by {deviation:.1e} of the largest, "
            f"more than {allowed:.0e}"
        )


def _compared(served: _Answer, reference: _Answer, dtype: torch.dtype, spec: Spec) -> str:
    """A sentence for the card.

    Raises:
        ValueError: they are not alike.
    """
    allowed = TOLERANCE[dtype]
    _check_scores(served, reference, allowed)
    ours, theirs = served.result, reference.result
    if not isinstance(ours, RawMap) or not isinstance(theirs, RawMap):
        failed = ours if isinstance(ours, SpecFailed) else theirs
        why = failed.error.message if isinstance(failed, SpecFailed) else "it gave no map"
        raise ValueError(  # noqa: TRY004 - it is the model that is wrong.
            f"self-test: {spec.method} at {spec.layers[0]!r} failed: {why}"
        )
    alike = _alike(ours, theirs, allowed)
    least = least_correlation(dtype)
    if alike < least:
        raise ValueError(
            f"self-test: its {spec.method} map at {spec.layers[0]!r} correlates with that of the model as loaded, differentiated "
            f"from its input on, by {alike:.4f} only, less than {least}"
        )
    return f"self-test: {spec.method} at {spec.layers[0]!r} is that of the model as loaded (correlation {alike:.4f})"


def _alike(ours: RawMap, theirs: RawMap, allowed: float) -> float:
    """Correlation of two maps; 1 where they differ by rounding only, as two that are nearly zero do."""
    if ours.values.shape != theirs.values.shape:
        return 0.0
    scale = max(abs(theirs.raw_min), abs(theirs.raw_max))
    if float(np.abs(ours.values - theirs.values).max(initial=0.0)) <= allowed * scale:
        return 1.0
    return correlation(torch.from_numpy(ours.values), torch.from_numpy(theirs.values))


def _answer(model: PassModel, inputs: Sequence[Tensor], spec: Spec, rows: int) -> _Answer:
    """What the first row of a batch gets."""
    batch, *extras = (make_batch(value, rows) for value in inputs)
    reading: Reading | None = None
    result: RawMap | SpecFailed | None = None
    for event in run_pass(model, batch, [(spec,)] * rows, extras=extras):
        match event:
            case Forwarded():
                reading = event.readings[0]
            case Mapped() if event.row == 0 and result is None:
                result = event.result
    if reading is None:
        raise ValueError("self-test: the model gave no output")
    return _Answer(reading=reading, result=result)


def _read(model: PassModel, inputs: Sequence[Tensor], layer: str) -> None:
    batch = [make_batch(value, model.static_rows or 1) for value in inputs]
    captured = model.program.capture([TapName.parse(layer)], *batch, differentiable=False)
    (value,) = captured.activations.values()
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"self-test: layer {layer!r} has values that are not finite")


class _Whole:
    """A `Program` that is differentiated from its input on: nothing before a tap is left out."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def capture(
        self,
        taps: Sequence[TapName],
        *inputs: Tensor,
        differentiable: bool = True,
        rule: BackwardRule = BackwardRule.PLAIN,
    ) -> Capture:
        """As the program's, with a graph back to the inputs."""
        wanted = [
            value.detach().clone().requires_grad_(differentiable and value.is_floating_point()) for value in inputs
        ]
        return self._program.capture(taps, *wanted, differentiable=differentiable, rule=rule)

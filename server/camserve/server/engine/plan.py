"""What a pass has to compute: the specs of every row checked against the model, and what each of them is about.

`passes.py` calls `check` before the forward, which names the taps, and `settle` after it, when the outputs tell what the specs
are about. Both keep what can be done apart from what cannot: a spec that fails here is answered and touches no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeAlias

from camserve.server.cam.methods import (
    Amplified,
    Arithmetic,
    Contrast,
    Layerwise,
    Method,
    Need,
    Reads,
    find_method,
    first_component,
)
from camserve.server.cam.methods.augmentation import augmented
from camserve.server.engine.compiled import CompiledPlan
from camserve.server.engine.head import LinearHead
from camserve.server.engine.layout import Layout
from camserve.server.engine.pace import Pace
from camserve.server.engine.program import ATTENTION, INPUT, BackwardRule, Program, TapName
from camserve.server.engine.readouts import Aim
from camserve.server.errors import CamserveError, ExecutionFailed, InvalidRequest, Reason, Unsupported
from camserve.server.jobs import FloatArray, OutputKind, ResolvedTarget, Score, Spec, SpecFailed, Target

__all__ = ["Aiming", "Ask", "Failure", "PassModel", "check", "distinct_aims", "fresh", "rule_of", "settle", "taps_of"]

_RULES = {
    Need.GUIDED_GRADIENT: BackwardRule.GUIDED,
    Need.DECONVNET_GRADIENT: BackwardRule.DECONVNET,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PassModel:
    """A program and what was learnt about it at load.

    Attributes:
        program: the model.
        layouts: how the activation at each tap is laid out, by the tap's name as specs write it.
        classes: how many classes, values or dimensions a row has.
        kind: what it returns.
        head: the linear head behind average pooling, or None where the model has no such thing.
        head_layer: the tap whose average pooling feeds the head; empty without one.
        output_path: where in the model's output the card looks; see `readouts.select_output`.
        phrases: vectors of the phrases that text targets may name.
        max_rows: most rows in one forward, also of an amplified method.
        max_maps: most maps of one spec, where only the outputs tell how many there are.
        static_rows: the only number of rows the program takes, or None.
        whole_batch_maps: whether raw maps are computed for the whole batch at once rather than for one row; None takes rows where
            arithmetic costs most, on the CPU from layers of many values, and the batch where launching does. Last bits may vary.
        depths: how far back each layer lies, by its name as specs write it: 1 at the deepest stage, 2 at the one before it.
        pace: threads and chunks.
        compiled: what of it is compiled; None where its card does not ask for that.
    """

    program: Program
    layouts: Mapping[str, Layout]
    classes: int
    kind: OutputKind = OutputKind.CLASSIFICATION
    head: LinearHead | None = None
    head_layer: str = ""
    output_path: str = ""
    phrases: Mapping[str, FloatArray] = dataclasses.field(default_factory=dict)
    max_rows: int = 8
    max_maps: int = 128
    static_rows: int | None = None
    whole_batch_maps: bool | None = None
    depths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pace: Pace = dataclasses.field(default_factory=Pace)
    compiled: CompiledPlan | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One spec of one row that can be made as far as is known.

    Attributes:
        row: place in the batch.
        spec: as it came.
        method: found.
        arithmetic: the method's under the spec's profile and smoothing.
        taps: what it reads, one for each layer of the spec.
        layouts: of those taps; none for what is not a layer.
        aims: what it is about; empty until the forward.
    """

    row: int
    spec: Spec
    method: Method
    arithmetic: Arithmetic
    taps: tuple[TapName, ...]
    layouts: tuple[Layout, ...] = ()
    aims: tuple[Aim, ...] = ()

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes part in a gradient of the shared pass."""
        return not self.is_amplified and bool(self.method.needs - {Need.LINEAR_HEAD})

    @property
    def is_amplified(self) -> bool:
        """Whether it works on its row alone, after the shared pass."""
        return isinstance(self.arithmetic, Amplified)

    @property
    def rule(self) -> BackwardRule:
        """Under which rule its taps are captured."""
        return BackwardRule.ATTENTION if self.method.reads is Reads.ATTENTION else BackwardRule.PLAIN

    def key(self, aim: Aim) -> Hashable:
        """Equal for two aims of one row exactly if the same number is differentiated."""
        return self.spec.target.output_path, aim.key


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One spec of one row that cannot be made."""

    row: int
    spec_failed: SpecFailed


Aiming: TypeAlias = Callable[[int, Target, Contrast | None], tuple[Aim, ...]]
"""Answers what a target means for a row, as `Readout.aims`; made from the outputs of the forward by `passes.py`."""


def rule_of(need: Need) -> BackwardRule | None:
    """The rule under which a needed input gradient is taken; None for needs of another kind."""
    return _RULES.get(need)


def check(model: PassModel, specs: Iterable[tuple[int, Spec]]) -> tuple[list[Ask], list[Failure]]:
    """Finds method, taps and layouts of each (row, spec); whether the taps can be captured shows in the forward."""
    asks, failures = [], []
    for row, spec in specs:
        try:
            asks.append(_ask(model, row, spec))
        except CamserveError as error:
            failures.append(_failure(row, spec, error))
    return asks, failures


def settle(
    asks: Iterable[Ask],
    refusals: Mapping[TapName, CamserveError],
    aimer: Aiming,
    is_finite: Sequence[bool],
    max_maps: int,
) -> tuple[list[Ask], list[Failure]]:
    """Names what each ask is about.

    Args:
        asks: from `check`.
        refusals: taps that the program would not capture.
        aimer: knows the outputs.
        is_finite: whether all of a row's outputs are; there is nothing to explain about a row of others.
        max_maps: most of one spec.
    """
    settled, failures = [], []
    for ask in asks:
        refused = next((refusals[tap] for tap in ask.taps if tap in refusals), None)
        try:
            if refused is not None:
                raise refused
            if not is_finite[ask.row]:
                raise ExecutionFailed(
                    Reason.MODEL_FAILED,
                    "the model's outputs for this input are NaN or infinite: nothing can be explained",
                )
            aims = _aims(ask, aimer)
            if len(aims) > max_maps:
                raise InvalidRequest(
                    Reason.TOO_MANY_SPECS,
                    f"the target gives {len(aims)} maps for this input, more than the {max_maps} this server makes; ask about "
                    "fewer steps, classes or detections",
                    metadata={"maps": len(aims), "limit": max_maps},
                )
            settled.append(dataclasses.replace(ask, aims=aims))
        except CamserveError as error:
            failures.append(_failure(ask.row, ask.spec, error))
    return settled, failures


def distinct_aims(asks: Sequence[Ask], rows: int) -> list[dict[Hashable, tuple[Ask, Aim]]]:
    """Lists each row's distinct aims by key, with the first ask that has it; the place in the order is the aim's rank.

    Those to be differentiated come first: gradients are then as few as the largest number of them in one row.
    """
    found: list[dict[Hashable, tuple[Ask, Aim]]] = [{} for _ in range(rows)]
    for ask in sorted(asks, key=lambda ask: not ask.needs_gradient):
        for aim in ask.aims:
            found[ask.row].setdefault(ask.key(aim), (ask, aim))
    return found


def fresh(error: CamserveError, message: str = "") -> CamserveError:
    """Returns an equal error: one refusal of a tap may fail many specs, and the edge writes each one's field path into it.

    Args:
        error: to copy.
        message: instead of its own, if given.
    """
    return type(error)(
        error.reason,
        message or error.message,
        field=error.field,
        metadata=error.metadata,
        retry_after_seconds=error.retry_after_seconds,
    )


def _ask(model: PassModel, row: int, spec: Spec) -> Ask:
    method = find_method(spec.method)
    arithmetic = _smoothed(method.under(spec.profile), method, spec)
    if Need.LINEAR_HEAD in method.needs:
        _check_head(model, method, spec)
    is_layered = method.reads is Reads.LAYERS
    return Ask(
        row=row,
        spec=spec,
        method=method,
        arithmetic=arithmetic,
        taps=taps_of(model, method, spec),
        layouts=tuple(_layout(model, layer) for layer in spec.layers) if is_layered else (),
    )


def taps_of(model: PassModel, method: Method, spec: Spec) -> tuple[TapName, ...]:
    """What a spec's method reads."""
    match method.reads:
        case Reads.LAYERS:
            return tuple(TapName.parse(layer) for layer in spec.layers)
        case Reads.INPUT:
            return (INPUT,)
        case Reads.BIASES:
            return (INPUT, *model.program.biases())
        case Reads.ATTENTION:
            return (ATTENTION,)


def _smoothed(arithmetic: Arithmetic, method: Method, spec: Spec) -> Arithmetic:
    """The arithmetic under the spec's smoothing; validation has seen to it that the method has it."""
    if spec.smoothing.eigen and isinstance(arithmetic, Layerwise):
        arithmetic = Layerwise(arithmetic.weigh, first_component)
    if spec.smoothing.augmentation:
        if not isinstance(arithmetic, Layerwise):
            raise Unsupported(
                Reason.METHOD_UNSUPPORTED_BY_MODEL,
                f"augmentation smoothing averages maps of layers, which {method.slug} does not make; leave it out",
                metadata={"method": method.slug},
            )
        arithmetic = augmented(arithmetic)
    return arithmetic


def _aims(ask: Ask, aimer: Aiming) -> tuple[Aim, ...]:
    if ask.method.has_target:
        return aimer(ask.row, ask.spec.target, _contrast(ask))
    maps = ask.arithmetic.maps if isinstance(ask.arithmetic, Amplified) else None
    count = 1 if maps is None else maps(ask.spec.parameters)
    # One aim even for several maps: nothing tells them apart before they are made.
    return (Aim(target=ResolvedTarget(class_index=None, score=Score.LOGIT, value=0.0, count=count), key=None),)


def _contrast(ask: Ask) -> Contrast | None:
    if ask.method.contrast is None:
        return None
    chosen, asked = ask.method.contrast[ask.spec.profile], ask.spec.parameters
    return dataclasses.replace(
        chosen,
        classes=chosen.classes if asked.similar_classes is None else asked.similar_classes,
        weight=chosen.weight if asked.contrast is None else asked.contrast,
    )


def _layout(model: PassModel, layer: str) -> Layout:
    if layer not in model.layouts:
        raise Unsupported(
            Reason.LAYER_UNUSABLE,
            f"layer {layer!r} has no known layout of channels and cells; layers that have: {', '.join(model.layouts)}",
            metadata={"layer": layer, "known": ", ".join(model.layouts)},
        )
    layout = model.layouts[layer]
    if not 1 <= len(layout.grid) <= 3:
        raise Unsupported(
            Reason.LAYER_UNUSABLE,
            f"layer {layer!r} has {len(layout.grid)} spatial axes; a map has one to three; choose a layer before the pooling",
            metadata={"layer": layer, "axes": len(layout.grid)},
        )
    return layout


def _check_head(model: PassModel, method: Method, spec: Spec) -> None:
    """CAM's identity holds at one layer only: the one that is averaged over its cells and multiplied by the head's weights."""
    if model.head is None:
        problem = "this model's classes are not that"
    else:
        if all(_is_same_tap(model.program, layer, model.head_layer) for layer in spec.layers):
            return
        problem = f"in this model only layer {model.head_layer!r} has that, not {', '.join(map(repr, spec.layers))}"
    raise Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"{method.slug} needs a layer whose average over its cells, times one linear layer, is the class logits; {problem}; "
        "use grad-cam, which generalises it to any layer",
        metadata={
            "method": method.slug,
            "layers": ", ".join(spec.layers),
            "headLayer": model.head_layer,
            "instead": "grad-cam",
        },
    )


def _is_same_tap(program: Program, one: str, other: str) -> bool:
    return one == other or _last_call(program, one) == _last_call(program, other)


def _last_call(program: Program, layer: str) -> TapName:
    """The tap with its call index spelt out: a bare name is the module's last call."""
    tap = TapName.parse(layer)
    if tap.call is not None:
        return tap
    indices = [call.index for call in program.calls() if call.path == tap.path]
    return dataclasses.replace(tap, call=max(indices)) if indices else tap


def _failure(row: int, spec: Spec, error: CamserveError) -> Failure:
    return Failure(row=row, spec_failed=SpecFailed(spec_index=spec.index, error=fresh(error)))

"""What a pass has to compute: the specs of every row checked against the model, and their targets numbered.

`passes.py` calls `check` before the forward, which names the taps, and `settle` after it, when the logits tell which classes the
specs are about. Both keep what can be done apart from what cannot: a spec that fails here is answered and touches no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from camserve.server.cam.methods import Compute, Method, Need, find_method
from camserve.server.engine.head import LinearHead
from camserve.server.engine.layout import Layout
from camserve.server.engine.program import Program, TapName
from camserve.server.engine.targets import resolve
from camserve.server.errors import CamserveError, Reason, Unsupported
from camserve.server.jobs import ResolvedTarget, Spec, SpecFailed

__all__ = ["Ask", "Failure", "PassModel", "check", "distinct_targets", "fresh", "settle"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PassModel:
    """A program and what was learnt about it at load.

    Attributes:
        program: the model.
        layouts: how the activation at each tap is laid out, by the tap's name as specs write it.
        classes: how many logits a row has.
        head: the linear head behind average pooling, or None where the model has no such thing.
        head_layer: the tap whose average pooling feeds the head; empty without one.
        output_path: where the class logits are in the model's output; see `targets.select_output`.
        whole_batch_maps: whether raw maps are computed for the whole batch at once rather than for one row; None takes rows on
            the CPU, where arithmetic costs most, and the batch elsewhere, where launching does. Last bits may differ.
    """

    program: Program
    layouts: Mapping[str, Layout]
    classes: int
    head: LinearHead | None = None
    head_layer: str = ""
    output_path: str = ""
    whole_batch_maps: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One spec of one row that can be made as far as is known.

    Attributes:
        row: place in the batch.
        spec: as it came.
        method: found.
        compute: the method's arithmetic under the spec's profile.
        taps: one for each layer of the spec.
        layouts: of those taps.
        targets: the classes it is about; empty until the forward.
    """

    row: int
    spec: Spec
    method: Method
    compute: Compute
    taps: tuple[TapName, ...]
    layouts: tuple[Layout, ...]
    targets: tuple[ResolvedTarget, ...] = ()

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes part in a gradient."""
        return Need.GRADIENT in self.method.needs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One spec of one row that cannot be made."""

    row: int
    spec_failed: SpecFailed


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
    asks: Iterable[Ask], refusals: Mapping[TapName, CamserveError], logits: npt.NDArray[np.floating[Any]]
) -> tuple[list[Ask], list[Failure]]:
    """Names the classes each ask is about.

    Args:
        asks: from `check`.
        refusals: taps that the program would not capture.
        logits: (b, classes), on the host.
    """
    settled, failures = [], []
    for ask in asks:
        refused = next((refusals[tap] for tap in ask.taps if tap in refusals), None)
        try:
            if refused is not None:
                raise refused
            settled.append(dataclasses.replace(ask, targets=resolve(logits[ask.row], ask.spec.target)))
        except CamserveError as error:
            failures.append(_failure(ask.row, ask.spec, error))
    return settled, failures


def distinct_targets(asks: Sequence[Ask], rows: int) -> list[list[ResolvedTarget]]:
    """Lists each row's distinct (class, score) pairs; the place in the list is the pair's rank.

    Those to be differentiated come first: gradients are then as few as the largest number of them in one row.
    """
    found: list[dict[tuple[object, ...], ResolvedTarget]] = [{} for _ in range(rows)]
    for ask in sorted(asks, key=lambda ask: not ask.needs_gradient):
        for target in ask.targets:
            found[ask.row].setdefault((target.class_index, target.score), target)
    return [list(targets.values()) for targets in found]


def fresh(error: CamserveError) -> CamserveError:
    """Returns an equal error: one refusal of a tap may fail many specs, and the edge writes each one's field path into it."""
    return type(error)(
        error.reason,
        error.message,
        field=error.field,
        metadata=error.metadata,
        retry_after_seconds=error.retry_after_seconds,
    )


def _ask(model: PassModel, row: int, spec: Spec) -> Ask:
    method = find_method(spec.method)
    compute = method.under(spec.profile)
    if Need.LINEAR_HEAD in method.needs:
        _check_head(model, method, spec)
    return Ask(
        row=row,
        spec=spec,
        method=method,
        compute=compute,
        taps=tuple(TapName.parse(layer) for layer in spec.layers),
        layouts=tuple(_layout(model, layer) for layer in spec.layers),
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

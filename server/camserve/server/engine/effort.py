"""How much of the device a request will take, as far as its specs tell before anything runs.

`queue.py` asks when a request is put; the planner groups by the form and estimates by the depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from camserve.server.cam.methods import Amplified, Method, Need, find_method
from camserve.server.engine.compiled import COMPILED
from camserve.server.engine.plan import PassModel, rule_of, taps_of
from camserve.server.engine.planned import PlannedProgram
from camserve.server.engine.program import INPUT, TapName
from camserve.server.jobs import Spec

__all__ = ["Effort", "effort_of"]

# A forward of its own under another rule, and the gradient back to the input through it, weigh more than any depth.
_RULE_DEPTH = 1000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a request asks of a pass.

    Attributes:
        form: which form of the program runs it; rows of different forms do not share a pass, lest a row's bits depend on its
            neighbours.
        depth: 0 for a forward alone, 1 for a gradient back to the deepest stage, more for shallower ones, most back to the input.
        is_amplified: whether many passes over the row follow.
    """

    form: str
    depth: int
    is_amplified: bool


def effort_of(model: PassModel, specs: Sequence[Spec]) -> Effort:
    """Reads it off the specs, which were validated against the model's card."""
    taps: list[TapName] = []
    depth, is_amplified = 0, False
    for spec in specs:
        method = find_method(spec.method)
        if isinstance(method.under(spec.profile), Amplified) or spec.smoothing.augmentation:
            is_amplified = True
            continue
        found = taps_of(model, method, spec)
        taps += found
        depth = max(depth, _depth(model, method, spec, found))
    return Effort(form=_form(model, specs, taps), depth=depth, is_amplified=is_amplified)


def _form(model: PassModel, specs: Sequence[Spec], taps: Sequence[TapName]) -> str:
    if model.compiled is not None and model.compiled.rides(specs):
        return COMPILED
    return model.program.form_of(taps) if isinstance(model.program, PlannedProgram) else ""


def _depth(model: PassModel, method: Method, spec: Spec, taps: Sequence[TapName]) -> int:
    rules = sum(rule_of(need) is not None for need in method.needs)
    deepest = max(model.depths.values(), default=0)
    depth = 0
    if method.needs & {Need.GRADIENT, Need.CURVATURE}:
        depth = (
            deepest + 1
            if INPUT in taps
            else max((model.depths.get(layer, deepest) for layer in spec.layers), default=0)
        )
    return depth + rules * _RULE_DEPTH

"""Captured tensors to the `Evidence` a method is computed from.

`mapping.py` asks for the rows of a shared pass, `scene.py` for the tries of an amplified method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from camserve.server.cam.methods import Evidence, Need
from camserve.server.engine.graph import Gradients
from camserve.server.engine.layout import Layout, LayoutKind, channels_first
from camserve.server.engine.plan import Ask, PassModel
from camserve.server.engine.program import ATTENTION, INPUT, BackwardRule, TapName
from camserve.server.errors import CamserveError, Reason, Unsupported

__all__ = ["Differentiated", "differentiable", "evidence_at", "seen_attentions"]

Differentiated = Mapping[BackwardRule | str, Gradients]
"""Gradients by the rule they were taken under; curvatures under `"curvature"`."""


def evidence_at(
    model: PassModel,
    ask: Ask,
    tap: TapName,
    activations: Mapping[TapName, Tensor],
    found: Differentiated,
    *,
    rows: slice = slice(None),
    class_weight: Tensor | None = None,
) -> Evidence:
    """The evidence at one tap.

    Args:
        model: for layouts and biases.
        ask: whose method needs it.
        tap: which place; an attention's own name, such as `@attention#0`, not `ATTENTION`.
        activations: of the pass.
        found: its gradients, as far as the method needs any.
        rows: which of them.
        class_weight: of those rows.

    Raises:
        CamserveError: the target cannot be differentiated with respect to it.
    """
    layout = dict(zip(ask.taps, ask.layouts, strict=False)).get(tap)
    needs = ask.method.needs
    gradient = curvature = input_gradient = bias = None
    if Need.GRADIENT in needs:
        rule = BackwardRule.ATTENTION if tap.path == ATTENTION.path else BackwardRule.PLAIN
        gradient = _read(differentiable(found[rule], tap)[rows], layout)
    if Need.CURVATURE in needs:
        curvature = _read(differentiable(found["curvature"], tap)[rows], layout)
    for need, rule in ((Need.GUIDED_GRADIENT, BackwardRule.GUIDED), (Need.DECONVNET_GRADIENT, BackwardRule.DECONVNET)):
        if need in needs:
            input_gradient = differentiable(found[rule], INPUT)[rows]
    if layout is None and tap != INPUT and tap.path != ATTENTION.path:
        bias = model.program.biases().get(tap)
    tokens = _tokens(model, keys=activations[tap].shape[-1]) if tap.path == ATTENTION.path else None
    return Evidence(
        activation=_read(activations[tap][rows], layout),
        gradient=gradient,
        class_weight=class_weight,
        curvature=curvature,
        input_gradient=input_gradient,
        bias=bias,
        grid=tokens.grid if tokens else None,
        prefix=tokens.prefix if tokens else 0,
        parameters=ask.spec.parameters,
    )


def seen_attentions(taps: Sequence[TapName]) -> list[TapName]:
    """The attentions among captured taps, in order of execution."""
    return sorted((tap for tap in taps if tap.path == ATTENTION.path), key=lambda tap: tap.call or 0)


def differentiable(gradients: Gradients, tap: TapName) -> Tensor:
    """The gradient at a tap.

    Raises:
        CamserveError: there is none, and why.
    """
    gradient = gradients[tap]
    if isinstance(gradient, CamserveError):
        raise gradient
    if gradient is None:
        where = "the model's input" if tap == INPUT else f"layer '{tap}'"
        raise Unsupported(
            Reason.TARGET_NOT_DIFFERENTIABLE,
            f"no gradient of the target reaches {where}: it is computed after the scores or beside them, or what lies between is "
            "detached or whole numbers; choose a layer that feeds the scores, or a method without a gradient, such as eigen-cam "
            "or score-cam",
            metadata={"layer": tap},
        )
    return gradient


def _read(value: Tensor, layout: Layout | None) -> Tensor:
    return value if layout is None else channels_first(value, layout)


def _tokens(model: PassModel, keys: int) -> Layout:
    """How the tokens lie on the input that an attention with so many keys is over.

    Class and register tokens are put before the patches only after those were embedded, so that early layers have fewer tokens.
    Where none has as many as there are keys, any is given: the method then refuses the attention, and says why.

    Raises:
        Unsupported: no layer of the model is a sequence of tokens over a known grid.
    """
    sequences = [layout for layout in model.layouts.values() if layout.kind is LayoutKind.TOKENS]
    exact = [layout for layout in sequences if layout.prefix + math.prod(layout.grid) == keys]
    found = next(iter([*exact, *sequences]), None)
    if found is None:
        raise Unsupported(
            Reason.METHOD_UNSUPPORTED_BY_MODEL,
            "no layer of this model is a sequence of tokens whose grid is known, so attention cannot be laid on the image; "
            "use grad-cam",
            metadata={"instead": "grad-cam"},
        )
    return found

"""ReLUs that gate the gradient on its way back: guided backpropagation and the deconvnet.

Arrives: a ReLU's input, and by which rule gradients pass. Leaves: the ReLU's own value, bit for bit, with another backward.
`eager_relu.py` puts these in the place of modules, `export_relu.py` in the place of graph nodes. Which operators count as a ReLU
is told here for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from camserve.server.engine.program import BackwardRule, ProgramKind
from camserve.server.errors import Reason, Unsupported

__all__ = ["GATES", "Gate", "activation_of", "gate_of", "gated", "without_gates"]

GATES = frozenset({BackwardRule.GUIDED, BackwardRule.DECONVNET})

# Activations that neither paper says anything of; a refusal lists those that were met.
_OTHERS = frozenset(
    {
        *("gelu", "silu", "mish", "elu", "celu", "selu", "leaky_relu", "rrelu_with_noise", "prelu", "_prelu_kernel"),
        *("softplus", "hardswish", "hardsigmoid", "sigmoid", "tanh", "log_sigmoid", "log_sigmoid_forward", "glu"),
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One ReLU.

    Attributes:
        ceiling: above which it is flat too, or None; 6 for ReLU6.
        is_in_place: it writes to its input, which the model may hold under another name.
    """

    ceiling: float | None = None
    is_in_place: bool = False


def gated(value: Float[Tensor, "*shape"], gate: Gate, rule: BackwardRule) -> Float[Tensor, "*shape"]:
    """Applies a ReLU whose backward follows the rule.

    Guided (arXiv:1412.6806, section 3): the gradient passes where it is positive and the ReLU itself would let it pass.
    Deconvnet (arXiv:1311.2901, section 2.1): it passes where it is positive, whatever the input was.

    Args:
        value: the ReLU's input; overwritten by an in-place ReLU.
        gate: which ReLU.
        rule: `GUIDED` or `DECONVNET`.
    """
    result: Tensor = _Gated.apply(value, gate.ceiling, rule)
    return value.copy_(result) if gate.is_in_place else result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, ceiling: float | None, rule: BackwardRule) -> Tensor:
        ctx.is_guided = rule is BackwardRule.GUIDED
        if ctx.is_guided:
            is_open = value > 0
            ctx.save_for_backward(is_open if ceiling is None else is_open & (value < ceiling))
        return functional.relu(value) if ceiling is None else functional.hardtanh(value, 0.0, ceiling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        positive = functional.relu(gradient)
        if ctx.is_guided:
            (is_open,) = ctx.saved_tensors
            positive = positive.masked_fill(~is_open, 0)
        return positive, None, None


def gate_of(operator: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Gate | None:
    """Tells whether a call of an ATen operator is a ReLU or a ReLU6, and which; None for every other call."""
    name = _name_of(operator)
    match name.removesuffix("_"):
        case "relu":
            limits: tuple[Any, ...] = (0, None)
        case "relu6":
            limits = (0, 6)
        case "clamp_min":
            limits = (*_given(arguments, options, ("min",), (None,)), None)
        case "clamp" | "clip":
            limits = _given(arguments, options, ("min", "max"), (None, None))
        case "hardtanh":
            limits = _given(arguments, options, ("min_val", "max_val"), (-1, 1))
        case "threshold" if _given(arguments, options, ("threshold", "value"), (None, None)) == (0, 0):
            limits = (0, None)
        case _:
            return None
    if not all(limit is None or isinstance(limit, int | float) for limit in limits) or limits not in (
        (0, None),
        (0, 6),
    ):
        return None
    return Gate(ceiling=limits[1], is_in_place=name.endswith("_"))


def activation_of(operator: Any) -> str:
    """The name of an ATen operator that is an activation but no ReLU, '' for others."""
    name = _name_of(operator).removesuffix("_")
    return name if name in _OTHERS else ""


def _name_of(operator: Any) -> str:
    if isinstance(operator, torch._ops.OpOverload) and operator.namespace == "aten":  # noqa: SLF001 - no public name.
        return operator._schema.name.removeprefix("aten::")  # noqa: SLF001
    return ""


def _given(
    arguments: Sequence[Any], options: Mapping[str, Any], names: Sequence[str], defaults: Sequence[Any]
) -> tuple[Any, ...]:
    """What a call gives for the named parameters, which follow the tensor."""
    return tuple(
        arguments[place] if place < len(arguments) else options.get(name, default)
        for place, (name, default) in enumerate(zip(names, defaults, strict=True), start=1)
    )


def without_gates(rule: BackwardRule, kind: ProgramKind, found: Sequence[str]) -> Unsupported:
    """The refusal of a program that has no ReLU, with the activations it has."""
    listed = ", ".join(dict.fromkeys(found)) or "no activation that is known"
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"rule '{rule}' changes the backward of ReLUs and this {kind} program has none (found: {listed}); "
        "use vanilla-backprop, or grad-cam at a layer",
        metadata={"rule": rule, "kind": kind, "found": listed},
    )

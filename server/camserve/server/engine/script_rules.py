"""Guided and deconvnet gradients of a TorchScript program: its rectifiers are replaced by ones that differentiate by the rule.

Arrives: the marked graph of `script_graph.py`, which is only read. Leaves: a copy whose forward has the same bits. `script.py`
makes a form of it.

A rectifier is an operator, so functional ReLUs follow the rule as modules do, in branches and loops too: `relu`, `relu6`,
`hardtanh` and `clamp` from 0 to 6, `threshold` at 0, `clamp_min` at 0. Other activations (leaky ReLU, SiLU, GELU, …) have no rule
in either paper and keep their own derivative; a program that has only those is refused.

No composition of ordinary operators can do this: their derivatives are linear in the gradient, and a rule that looks at its sign
is not. So two operators are registered with torch, `camserve::rectified` and its in-place sibling. Their schemas say about memory
what those of the operators they replace say, and hence all that is known about a tap's memory stays true.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from camserve.server.engine.program import BackwardRule
from camserve.server.engine.script_graph import Graph, Node, copied, insert_constants, walk
from camserve.server.errors import Reason, Unsupported

__all__ = ["ruled_graph"]

_BOUND: Final = 6  # Where ReLU6 saturates.
# What each operator does, in place with an underscore: the same kernels give the same bits.
_FORWARDS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": torch.relu,
    "relu_": torch.relu_,
    "relu6": torch.ops.aten.relu6,
    "relu6_": torch.ops.aten.relu6_,
    "hardtanh": lambda x: torch.ops.aten.hardtanh(x, 0, _BOUND),
    "hardtanh_": lambda x: torch.ops.aten.hardtanh_(x, 0, _BOUND),
    "clamp": lambda x: x.clamp(0, _BOUND),
    "clamp_": lambda x: x.clamp_(0, _BOUND),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_min_": lambda x: x.clamp_min_(0),
    "threshold": lambda x: torch.ops.aten.threshold(x, 0, 0),
    "threshold_": lambda x: torch.ops.aten.threshold_(x, 0, 0),
}
_BOUNDED: Final = frozenset({"relu6", "hardtanh", "clamp", "relu6_", "hardtanh_", "clamp_"})

_OTHER_ACTIVATIONS: Final = re.compile(
    r"aten::(gelu|silu|mish|elu|celu|selu|leaky_relu|rrelu|prelu|hardswish|hardsigmoid|hardtanh|softplus|tanh|sigmoid|glu|clamp)_?"
)
# A convolution or sum with its ReLU in one kernel, as inference optimisers leave them.
_FUSED: Final = re.compile(
    r"(?!aten::leaky_relu).*_relu_?|aten::_addmm_activation|prepacked::.*clamp_run|mkldnn_prepacked::.*"
)
_UNSEEN: Final = frozenset(
    {"prim::CallMethod", "prim::CallFunction", "prim::fork", "prim::awaitable", "prim::rpc_async"}
)


class _Rectified(torch.autograd.Function):
    """A rectifier whose derivative follows a rule: under both a negative gradient stops, under one a closed gate too."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, operator: str, is_guided: bool) -> Tensor:  # noqa: FBT001 - torch calls it
        outputs = _FORWARDS[operator](inputs)
        if operator.endswith("_"):
            ctx.mark_dirty(inputs)
        if is_guided:
            ctx.save_for_backward(outputs)
        ctx.is_bounded = operator in _BOUNDED
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].relu()
        if ctx.saved_tensors:
            (outputs,) = ctx.saved_tensors
            # What autograd itself runs for these operators; an output tells as well as the input whether the gate was open.
            gradient = (
                torch.ops.aten.hardtanh_backward(gradient, outputs, 0, _BOUND)
                if ctx.is_bounded
                else torch.ops.aten.threshold_backward(gradient, outputs, 0)
            )
        return gradient, None, None


def _rectified(inputs: Tensor, operator: str, is_guided: bool) -> Tensor:  # noqa: FBT001 - torch calls it
    outputs: Tensor = _Rectified.apply(inputs, operator, is_guided)
    return outputs


# torch's dispatcher, and with it the graph interpreter, knows the operators as long as this object lives. It has no types.
_LIBRARY: Final[Any] = torch.library.Library("camserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("rectified(Tensor x, str operator, bool is_guided) -> Tensor")
_LIBRARY.define("rectified_(Tensor(a!) x, str operator, bool is_guided) -> Tensor(a!)")
_LIBRARY.impl("rectified", _rectified, "CompositeImplicitAutograd")
_LIBRARY.impl("rectified_", _rectified, "CompositeImplicitAutograd")


def ruled_graph(marked: Graph, rule: BackwardRule) -> Graph:
    """A copy of a marked graph in which every rectifier differentiates by `rule`, `GUIDED` or `DECONVNET`; marks stay.

    Raises:
        Unsupported: there is no rectifier, or one that cannot be reached.
    """
    graph = copied(marked)
    nodes = [node for node, _ in walk(graph)]
    kinds = list(dict.fromkeys(node.kind() for node in nodes))
    hidden = [kind for kind in kinds if kind in _UNSEEN or _FUSED.fullmatch(kind)]
    if hidden:
        raise _refused(rule, f"its ReLUs may be inside {_named(hidden)}, where their gradient cannot be changed")
    rectifiers = [(node, name) for node in nodes if (name := _rectifier(node))]
    if not rectifiers:
        others = [kind for kind in kinds if _OTHER_ACTIVATIONS.fullmatch(kind)]
        found = f"its activations are {_named(others)}" if others else "it has no activation function"
        raise _refused(rule, f"the rule is for ReLUs, of which it has none ({found})")
    for node, name in rectifiers:
        ending = "_" if node.kind().endswith("_") else ""
        constants = insert_constants(graph, [name + ending, rule is BackwardRule.GUIDED], before=node)
        ruled = graph.create(f"camserve::rectified{ending}", [node.inputsAt(0), *constants], 1)
        ruled.insertBefore(node)
        ruled.output().setType(node.output().type())
        node.output().replaceAllUsesWith(ruled.output())
        node.destroy()
    return graph


def _rectifier(node: Node) -> str | None:
    """The name in `_FORWARDS` of what a node does, None if it is no rectifier."""
    name = node.kind().removeprefix("aten::").removesuffix("_")
    if not node.kind().startswith("aten::"):
        return None
    settings = [_number(value) for value in list(node.inputs())[1:]]
    match name, settings:
        case ("relu" | "relu6", []):
            return str(name)
        case ("hardtanh" | "clamp", [0, 6]):
            return str(name)
        case ("clamp_min", [0]) | ("clamp", [0, None]):
            return "clamp_min"
        case ("threshold", [0, 0]):
            return "threshold"
        case _:
            return None


def _number(value: Any) -> float | str | None:
    """A constant number or None; a word for everything that only a forward knows."""
    if value.node().kind() != "prim::Constant":
        return "unknown"
    constant = value.toIValue()
    return constant if constant is None or isinstance(constant, (int, float)) else "unknown"


def _named(kinds: list[str]) -> str:
    return ", ".join(kind.removeprefix("aten::") for kind in kinds)


def _refused(rule: BackwardRule, why: str) -> Unsupported:
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"{rule} gradients cannot be had of this torchscript model: {why}; "
        "vanilla-backprop and grad-cam work with any activation",
        metadata={"rule": rule, "kind": "torchscript"},
    )

"""Lists what each affine operator of an exported program adds to its output.

Arrives: the flat graph (`export_flat.py`). Leaves: a constant for each module call that returns such an operator's result, since
only those can be tapped. Whatever else brings a constant into the data is refused. `ExportProgram.biases` is the caller.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from camserve.server.engine.export_flat import Flat
from camserve.server.engine.hooked_biases import incomplete, norm_constant
from camserve.server.engine.program import ProgramKind, TapName
from camserve.server.errors import Unsupported

__all__ = ["biases_of_graph"]

_CONVOLUTIONS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "linear"}
)
_BATCH_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
_OTHER_NORMS = ("layer_norm", "group_norm", "instance_norm", "rms_norm", "batch_norm")
# What a constant tensor may be used for without anything being added: to scale, to choose, to be a weight.
_SCALING = frozenset({"mul", "div", "matmul", "mm", "bmm", "prelu", "_prelu_kernel", "index", "index_select", "gather"})
_ADDING = frozenset({"add", "sub", "rsub"})


def biases_of_graph(module: nn.Module, flat: Flat) -> dict[TapName, Tensor]:
    """Returns the constants, (c) each, in order of execution.

    Args:
        module: the program, which holds the attributes that the graph names.
        flat: its graph.

    Raises:
        Unsupported: an operator's constant cannot be told, or its result cannot be tapped.
    """
    reader = _Reader(module, flat)
    found = {}
    for node in flat.nodes:
        constant = reader.constant_of(node) if node.op == "call_function" and reader.is_data(node) else None
        if constant is not None:
            found[reader.tap_of(node)] = constant.detach().clone()
    return found


class _Reader:
    """Tells data, which depends on the values of an input, from constants and sizes."""

    def __init__(self, module: nn.Module, flat: Flat) -> None:
        self._module = module
        self._owners = flat.owners
        self._ends: dict[fx.Node, TapName] = {}
        for end in flat.ends:
            if isinstance(end.value, fx.Node):
                self._ends.setdefault(end.value, end.name)  # The innermost module comes first.
        self._data: set[fx.Node] = set()
        for node in flat.nodes:
            is_size = _name_of(node) in {"sym_size", "size"}
            if node.op == "placeholder" or (not is_size and any(node in self._data for node in node.all_input_nodes)):
                self._data.add(node)

    def is_data(self, node: fx.Node) -> bool:
        return node in self._data

    def constant_of(self, node: fx.Node) -> Tensor | None:
        name, args = _name_of(node), node.args
        if name in _CONVOLUTIONS or name == "addmm":
            data, weight = args[1:3] if name == "addmm" else args[:2]
            bias = args[0] if name == "addmm" else (args[2] if len(args) > 2 else node.kwargs.get("bias"))
            if data not in self._data or weight in self._data or bias in self._data:
                raise self._refusal(node, "has a weight or a bias that is computed from the input")
            return self._value(bias)
        if name in _BATCH_NORMS and (name != "batch_norm" or args[5] is False):
            weight, bias, mean, variance = (self._value(value) for value in args[1:5])
            if mean is not None and variance is not None:
                return norm_constant(weight, bias, mean, variance, float(args[7 if name == "batch_norm" else 6]))  # type: ignore[arg-type]
        if name.endswith(_OTHER_NORMS):
            raise self._refusal(node, "divides by the spread of its input, so that what it adds is no constant")
        is_adding = name.removesuffix("_") in _ADDING
        if is_adding and any(isinstance(value, int | float) and value != 0 for value in args[:2]):
            raise self._refusal(node, "adds a number")
        constants = [value for value in node.all_input_nodes if self._is_constant_tensor(value)]
        if is_adding and len(constants) == 1 and node.kwargs.get("alpha", 1) == 1:
            added = self._value(constants[0])
            if added is not None and _is_for_channels(added):
                # So do a frozen batch normalisation after it has scaled, and a linear layer that was decomposed.
                return -added.flatten() if name.startswith("sub") and constants[0] is args[1] else added.flatten()
        if constants and name.removesuffix("_") not in _SCALING:
            raise self._refusal(node, f"brings in '{constants[0].name}', which does not depend on the input")
        return None

    def tap_of(self, node: fx.Node) -> TapName:
        """The innermost module call that returns the node's result."""
        results = [node, *(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)]
        for result in results:
            if result in self._ends:
                return self._ends[result]
        raise self._refusal(node, "is called as a function whose result no module returns, so that it cannot be tapped")

    def _is_constant_tensor(self, node: fx.Node) -> bool:
        if node in self._data or _name_of(node) in {"sym_size", "size"} or _is_arithmetic(node.target):
            return False
        return node.op == "get_attr" or isinstance(node.target, torch._ops.OpOverload)  # noqa: SLF001 - no public name.

    def _value(self, value: Any) -> Tensor | None:
        """Computes a constant from attributes."""
        if not isinstance(value, fx.Node):
            return None
        if value.op == "get_attr":
            attribute = self._module
            for part in str(value.target).split("."):
                attribute = getattr(attribute, part)
            return attribute  # type: ignore[return-value]
        if value.op != "call_function" or any(_name_of(node) in {"sym_size", "size"} for node in value.all_input_nodes):
            raise self._refusal(value, "is a constant that depends on sizes")
        function: Callable[..., Any] = value.target  # type: ignore[assignment]
        args, kwargs = fx.map_arg((value.args, value.kwargs), self._value)
        result: Tensor = function(*args, **kwargs)
        return result

    def _refusal(self, node: fx.Node, problem: str) -> Unsupported:
        owner = self._owners.get(node, "")
        place = f"{node.target} in " + (f"layer '{owner}'" if owner else "the model itself")
        return incomplete(ProgramKind.EXPORT, place, problem)


def _name_of(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).rpartition("::")[2] if schema is not None else ""


def _is_for_channels(constant: Tensor) -> bool:
    """Whether a constant has one value for each channel, told by its shape: (1, c, 1, ...) for (b, c, ...), (c) for (..., c)."""
    return constant.dim() == 1 or (constant.dim() > 2 and constant.numel() == constant.shape[1])


def _is_arithmetic(target: Any) -> bool:
    return getattr(target, "__module__", "") in {"_operator", "math"}

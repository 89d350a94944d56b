"""What the affine layers of a TorchScript program add to their outputs, read from its graph.

Arrives: the form of a program in which operators have names. Leaves: constants by the tap at which they are added. `script.py`
hands them out; FullGrad's completeness (arXiv:1905.00780) rests on none being missed.

A layer is an operator here: convolutions, linear layers and matrix products with a vector added, batch normalisation with its
running statistics. Layer, group and instance normalisation depend on their input's own statistics: they are not affine and not
listed, and neither is a constant that a model adds by itself, such as a position embedding.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.engine import script_graph as graphs
from camserve.server.engine.program import TapName
from camserve.server.engine.script_form import Form
from camserve.server.errors import Reason, Unsupported

__all__ = ["biases_of"]

# Operators whose third argument is their bias.
_BIASED: Final = re.compile(r"aten::(conv(_transpose)?[123]d|_?convolution|linear)")
_PRODUCTS: Final = frozenset({"aten::matmul", "aten::mm", "aten::bmm"})
# Affine layers among other things, in one kernel, or calls of what cannot be looked into.
_CLOSED: Final = re.compile(
    r"quantized::.*|prepacked::.*|mkldnn.*::.*|aten::\w*convolution_\w*relu|aten::(mkldnn|cudnn|miopen)_convolution\w*"
    r"|aten::(_native|cudnn|miopen|native)_batch_norm\w*|aten::_batch_norm_impl_index|aten::_addmm_activation"
    r"|aten::_native_multi_head_attention|aten::_transformer_encoder_layer_fwd|aten::(lstm|gru|rnn_tanh|rnn_relu)\w*"
    r"|prim::(CallMethod|CallFunction|fork|awaitable|rpc_async)"
)


class _Unclear(Exception):
    """A constant cannot be told; the text says why. Never leaves this file."""


def biases_of(form: Form, archive: torch.jit.ScriptModule) -> dict[TapName, Float[Tensor, " c"]]:
    """What each affine operator adds, by the name of the module call that returns its output, else by the operator's own.

    Args:
        form: one whose operators have names.
        archive: what its graph was made of.

    Returns:
        In order of execution; names of layers that are called once have no call index.

    Raises:
        Unsupported: a constant cannot be told, or what it is added to cannot be tapped; names the layer.
    """
    biases: dict[TapName, Tensor] = {}
    for node, _ in graphs.walk(form.graph):
        try:
            bias = _bias(_Reader(form.graph, archive), node)
            if bias is not None:
                biases[_tap(form, node)] = bias
        except _Unclear as unclear:
            tap = _name(form, node)
            raise Unsupported(
                Reason.METHOD_UNSUPPORTED_BY_MODEL,
                f"what layer '{tap}' of this torchscript model adds to its output cannot be told: {unclear}; a sum over all "
                "biases, as fullgrad's, would miss it; gradient methods such as grad-cam and vanilla-backprop work",
                metadata={"layer": tap, "kind": "torchscript"},
            ) from unclear
    return biases


@dataclasses.dataclass(frozen=True, slots=True)
class _Reader:
    """Looks values of a graph up among its constants and the archive's tensors."""

    graph: graphs.Graph
    archive: torch.jit.ScriptModule

    def tensor(self, node: graphs.Node, number: int, what: str) -> Tensor | None:
        """The tensor that is an argument of a node, None if the argument is None."""
        is_known, value = graphs.constant_of(self.graph, self.archive, node.inputsAt(number))
        if not is_known or not (value is None or isinstance(value, Tensor)):
            raise _Unclear(f"its {what} is computed in the forward, not stored")
        return value.detach() if isinstance(value, Tensor) else None

    def is_stored(self, value: graphs.Value) -> bool:
        """Whether a value is a tensor of the archive."""
        is_known, found = graphs.constant_of(self.graph, self.archive, value)
        return is_known and isinstance(found, Tensor)


def _bias(reader: _Reader, node: graphs.Node) -> Tensor | None:
    """What an operator adds, None if nothing or if it is no affine layer."""
    kind = node.kind()
    if _BIASED.fullmatch(kind):
        return reader.tensor(node, 2, "bias")
    if kind == "aten::batch_norm":
        return _norm_bias(reader, node)
    if kind == "aten::addmm":
        # Of activations alone it is no layer.
        if not reader.is_stored(node.inputsAt(0)) and not reader.is_stored(node.inputsAt(2)):
            return None
        return _scaled(reader.tensor(node, 0, "bias"), node.inputsAt(3))
    if kind in {"aten::add", "aten::add_"}:
        return _added(reader, node)
    if _CLOSED.fullmatch(kind):
        raise _Unclear(f"{kind} computes whole layers at once")
    return None


def _norm_bias(reader: _Reader, node: graphs.Node) -> Tensor:
    if graphs.number_of(node.inputsAt(5)) is not False:
        raise _Unclear("it normalises by the statistics of the batch")
    weight, bias, mean, variance = (
        reader.tensor(node, number, what)
        for number, what in ((1, "weight"), (2, "bias"), (3, "running mean"), (4, "running variance"))
    )
    epsilon = graphs.number_of(node.inputsAt(7))
    if mean is None or variance is None or not isinstance(epsilon, float):
        raise _Unclear("its running statistics are not stored")
    shift = -mean.double() / torch.sqrt(variance.double() + epsilon)
    shift = shift if weight is None else shift * weight.double()
    return (shift if bias is None else shift + bias.double()).to(mean.dtype)


def _added(reader: _Reader, node: graphs.Node) -> Tensor | None:
    """A linear layer in two steps, as older versions of torch recorded it."""
    operands = [node.inputsAt(0), node.inputsAt(1)]
    for number, (product, stored) in enumerate((operands, operands[::-1])):
        if _maker(product).kind() in _PRODUCTS and reader.is_stored(stored):
            bias = reader.tensor(node, 1 - number, "bias")
            return _scaled(bias, node.inputsAt(2)) if bias is not None and bias.dim() == 1 else None
    return None


def _scaled(bias: Tensor | None, scale: graphs.Value) -> Tensor | None:
    factor = graphs.number_of(scale)
    if bias is None or factor is None:
        raise _Unclear("its bias is scaled in the forward")
    return bias if factor == 1 else bias * factor


def _maker(value: graphs.Value) -> graphs.Node:
    while value.node().kind() == "prim::unchecked_cast":
        value = value.node().input()
    return value.node()


def _tap(form: Form, node: graphs.Node) -> TapName:
    """The first name an operator's output can be tapped by."""
    refusal = "it has no name"
    for number in graphs.marked_outputs(node):
        refusal = form.places[number].refusal
        if not refusal and form.places[number].conditional:
            refusal = "it is in a branch that depends on the input"
        if not refusal:
            return form.name(number)
    raise _Unclear(f"its output cannot be tapped: {refusal}")


def _name(form: Form, node: graphs.Node) -> TapName | str:
    """What to call an operator in a message."""
    return next((form.name(number) for number in graphs.marked_outputs(node)), node.kind())

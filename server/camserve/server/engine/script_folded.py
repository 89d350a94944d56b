"""Rewrites the graph of an archive for speed: batch normalisation folded into the convolution before it, weights channels last.

Arrives: a marked graph, which is only read, and its archive. Leaves: a marked graph with the same calls, whose convolutions have
weights of their own. `script.py` makes a form of it; `plans.py` decides whether it serves.

A convolution's value in front of a folded normalisation is no longer computed: that call cannot be tapped here. The call of the
normalisation itself still returns what it did, to rounding. Convolutions are the same operators as before, in a forward with or
without a gradient, so that a row's bits do not depend on where its neighbours are tapped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camserve.server.engine import script_graph as graphs
from camserve.server.engine.script_graph import Graph, Node, Value

__all__ = ["rewritten_graph"]

_CONVOLUTIONS = frozenset({"aten::conv1d", "aten::conv2d", "aten::conv3d"})
_TRACED_CONVOLUTION = "aten::_convolution"
_NORMALISATION = "aten::batch_norm"
# They read a tensor's shape, which folding does not change.
_SHAPE_READS = frozenset({"aten::dim", "aten::size", "aten::len", "prim::dtype", "prim::device"})
_COMPARISONS = frozenset({"aten::eq", "aten::ne", "aten::lt", "aten::le", "aten::gt", "aten::ge", "aten::__not__"})
_WEIGHT, _BIAS = 1, 2


def rewritten_graph(marked: Graph, archive: torch.jit.ScriptModule, *, channels_last: bool) -> tuple[Graph, int]:
    """The rewritten graph, and how many operators changed; 0 says that there was nothing to rewrite.

    Args:
        marked: of the program as loaded.
        archive: holds the tensors; not changed.
        channels_last: whether to lay the weights of convolutions over two axes out channels last.
    """
    graph = graphs.copied(marked)
    changed = 0
    for node in list(graph.findAllNodes(_NORMALISATION)):
        changed += _fold(graph, archive, node)
    if channels_last:
        changed += _lay_out(graph, archive)
    _drop_rank_checks(graph)
    graphs.discard_unused(graph)
    return graph, changed


def _fold(graph: Graph, archive: torch.jit.ScriptModule, norm: Node) -> bool:
    """Folds one normalisation into the convolution that makes its input; leaves it alone where anything else reads that."""
    found = _convolution_before(norm)
    if found is None or norm.inputsAt(5).toIValue() is not False:
        return False
    conv, marked = found
    stored = [graphs.constant_of(graph, archive, norm.inputsAt(place)) for place in range(1, 5)]
    stored += [graphs.constant_of(graph, archive, conv.inputsAt(place)) for place in (_WEIGHT, _BIAS)]
    eps = graphs.number_of(norm.inputsAt(7))
    if eps is None or not all(is_stored for is_stored, _ in stored):
        return False
    gamma, beta, mean, variance, weight, bias = (value for _, value in stored)
    if not all(isinstance(value, Tensor) for value in (mean, variance, weight)):
        return False
    _set_constant(graph, conv, _WEIGHT, _BIAS, _folded(weight, bias, gamma, beta, mean, variance, eps))
    norm.output().replaceAllUsesWith(conv.output())
    norm.destroy()
    for mark, record in marked:
        graphs.forget(graph, mark, record)
    return True


def _convolution_before(norm: Node) -> tuple[Node, list[tuple[Node, Node]]] | None:
    """The convolution that makes a normalisation's input, with the marks between, if nothing else reads what it makes."""
    marked = []
    reader, value = norm, norm.inputsAt(0)
    while True:
        node = value.node()
        record = graphs.record_of(value)
        readers = [use.user for use in value.uses() if use.user.kind() not in _SHAPE_READS]
        if any(other not in (reader, record) for other in readers):
            return None
        if graphs.is_mark(node):
            marked.append((node, record))
            reader, value = node, node.inputsAt(0)
        elif node.kind() in _CONVOLUTIONS or (node.kind() == _TRACED_CONVOLUTION and not _is_transposed(node)):
            return (node, marked) if node.owningBlock() == norm.owningBlock() else None
        else:
            return None


def _is_transposed(conv: Node) -> bool:
    return conv.inputsAt(6).toIValue() is not False


def _folded(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight (o, i, *kernel) and bias (o) of convolution and normalisation in one; computed in float64, rounded once."""
    scale = (variance.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.double()
    folded = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


def _lay_out(graph: Graph, archive: torch.jit.ScriptModule) -> int:
    count = 0
    for node, _ in graphs.walk(graph):
        if node.kind() != "aten::conv2d" and node.kind() != _TRACED_CONVOLUTION:
            continue
        is_stored, weight = graphs.constant_of(graph, archive, node.inputsAt(_WEIGHT))
        if is_stored and isinstance(weight, Tensor) and weight.ndim == 4:
            laid_out = weight.detach().contiguous(memory_format=torch.channels_last)
            node.replaceInput(_WEIGHT, _constant(graph, node, laid_out))
            count += 1
    return count


def _drop_rank_checks(graph: Graph) -> None:
    """Removes checks that a tensor has so many axes: the card's input has, and they stand between operators that fuse."""
    # Those inside a check go with it: all are found before any goes.
    checks = [
        node
        for node in graph.findAllNodes("prim::If")
        if not node.outputsSize()
        and _asks_for_rank(node.inputsAt(0))
        and any(inner.kind() == "prim::RaiseException" for block in node.blocks() for inner in block.nodes())
    ]
    for node in checks:
        node.destroy()


def _asks_for_rank(value: Value) -> bool:
    """Whether a condition is about numbers of axes and constants alone."""
    node = value.node()
    if node.kind() in {"prim::Constant", "aten::dim"}:
        return True
    return node.kind() in _COMPARISONS and all(_asks_for_rank(given) for given in node.inputs())


def _set_constant(graph: Graph, conv: Node, weight: int, bias: int, values: tuple[Tensor, Tensor]) -> None:
    for place, value in zip((weight, bias), values, strict=True):
        conv.replaceInput(place, _constant(graph, conv, value))


def _constant(graph: Graph, before: Node, value: Any) -> Value:
    (constant,) = graphs.insert_constants(graph, [value], before=before)
    return constant

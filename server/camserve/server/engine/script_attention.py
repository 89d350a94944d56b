"""Attention of a TorchScript program, computed step by step so that its probabilities can be tapped.

Arrives: the marked graph of `script_graph.py`, which is only read. Leaves: a copy in which every attention's probabilities have a
mark, as if they were what a module called `@attention` returns. `script.py` makes a form of it.

Attention is `scaled_dot_product_attention`, replaced here by the formula it documents, or a softmax over the last dimension that
a model's own code multiplies with values. Whether such a softmax is an attention, its shape tells, and that only a forward knows:
so there is a first form with all candidates, and a second with those that `attentions_among` finds in it.

Transformers of `torch.nn` have a fast path, one kernel for a whole layer, chosen when no gradient is asked for. A scripted
archive holds both ways and is led past it; a trace holds the one that was taken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camserve.server.engine.program import ATTENTION
from camserve.server.engine.script_graph import (
    Chain,
    Graph,
    Node,
    Value,
    copied,
    insert_constants,
    mark_after,
    number_marks,
    number_of,
    walk,
)
from camserve.server.errors import Reason, Unsupported

__all__ = ["attention_graph", "attentions_among"]

_FUSED: Final = "aten::scaled_dot_product_attention"
_FAST_PATHS: Final = frozenset({"aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd"})
# What stands between probabilities and the product with values without changing them; a dropout in eval mode is gone already.
_TRANSPARENT: Final = frozenset({"prim::unchecked_cast", "aten::to", "aten::type_as", "aten::contiguous"})
_PRODUCTS: Final = frozenset({"aten::matmul", "aten::bmm"})
_LAST_OF_FOUR: Final = (-1, 3)


def _probabilities(
    query: Float[Tensor, "*b q c"],
    key: Float[Tensor, "*b k c"],
    mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None,
    is_causal: bool,  # noqa: FBT001
    scale: float | None,
    is_grouped: bool,  # noqa: FBT001
) -> Float[Tensor, "*b q k"]:
    """softmax(q k^T · scale + mask), as `torch.nn.functional.scaled_dot_product_attention` documents it."""
    if is_grouped:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf) if mask.dtype == torch.bool else scores + mask
    # Rows that are masked whole are zero, as the fused operator has them.
    probabilities: Tensor = torch.ops.aten._safe_softmax(scores, -1)  # noqa: SLF001 - there is no public name for it
    return probabilities


def _attended(
    probabilities: Float[Tensor, "*b q k"], value: Float[Tensor, "*b k v"], dropout: float
) -> Float[Tensor, "*b q v"]:
    """The mean of the values that probabilities stand for."""
    if dropout > 0:
        probabilities = torch.dropout(probabilities, dropout, train=True)
    if probabilities.dim() > 3 and value.size(-3) not in {1, probabilities.size(-3)}:
        value = value.repeat_interleave(probabilities.size(-3) // value.size(-3), -3)
    return probabilities @ value


# torch's dispatcher, and with it the graph interpreter, knows the operators as long as this object lives. It has no types.
_LIBRARY: Final[Any] = torch.library.Library("camserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "attention_probabilities(Tensor query, Tensor key, Tensor? mask, bool is_causal, float? scale, bool is_grouped) -> Tensor"
)
_LIBRARY.define("attended(Tensor probabilities, Tensor value, float dropout) -> Tensor")
_LIBRARY.impl("attention_probabilities", _probabilities, "CompositeImplicitAutograd")
_LIBRARY.impl("attended", _attended, "CompositeImplicitAutograd")


def attention_graph(marked: Graph, kept: Collection[int] | None = None) -> Graph:
    """A copy of a marked graph in which the probabilities of attentions are marked `@attention`, in order of execution.

    Args:
        marked: the program's graph.
        kept: which of the candidates get a mark, by number; all of them for None.

    Raises:
        Unsupported: there is no candidate, or a layer that is one kernel.
    """
    graph = copied(marked)
    candidates = 0
    for node, chain in list(walk(graph)):
        if node.kind() in _FAST_PATHS:
            _lead_past(graph, node, chain)
        elif node.kind() == _FUSED or _feeds_product(node):
            if kept is None or candidates in kept:
                _mark(graph, node)
            candidates += 1
    if not candidates:
        raise _refused("it computes no attention")
    number_marks(graph)
    return graph


def attentions_among(candidates: Sequence[Tensor | None], batch: int) -> list[int]:
    """Which candidates are self-attention over the tokens of each row, (b heads n n), by number.

    Args:
        candidates: values of one forward, None for one in a branch that was not taken.
        batch: how many rows it had.

    Raises:
        Unsupported: none is, or there is attention within parts of a row.
    """
    square = {
        number: value
        for number, value in enumerate(candidates)
        if value is not None and value.dim() == 4 and value.size(2) == value.size(3)
    }
    windowed = [tuple(value.shape) for value in square.values() if value.size(0) != batch]
    if windowed:
        raise _refused(
            f"it attends within parts of an image: probabilities of shape {windowed[0]} for a batch of {batch}"
        )
    if not square:
        shapes = ", ".join(str(tuple(value.shape)) for value in candidates if value is not None) or "none"
        raise _refused(
            f"none of its probabilities is of shape (batch, heads, tokens, tokens), as self-attention's are ({shapes}); "
            "multi-head attention of torch.nn has that shape if it is called with need_weights=False"
        )
    return list(square)


def _mark(graph: Graph, node: Node) -> None:
    if node.kind() != _FUSED:
        mark_after(graph, node, ATTENTION.path)
        return
    query, key, value, mask, dropout, is_causal, scale, is_grouped = node.inputs()
    probabilities = graph.create(
        "camserve::attention_probabilities", [query, key, mask, is_causal, scale, is_grouped], 1
    )
    attended = graph.create("camserve::attended", [probabilities.output(), value, dropout], 1)
    for made in (probabilities, attended):
        made.insertBefore(node)
        made.output().setType(node.output().type())
    node.output().replaceAllUsesWith(attended.output())
    node.destroy()
    mark_after(graph, probabilities, ATTENTION.path)


def _feeds_product(node: Node) -> bool:
    """Whether a node is a softmax over the last of four dimensions that is multiplied with something on its right."""
    return (
        node.kind() in {"aten::softmax", "aten::_softmax"}
        and number_of(node.inputsAt(1)) in _LAST_OF_FOUR
        and _is_multiplied(node.output())
    )


def _is_multiplied(value: Value) -> bool:
    return any(
        (use.user.kind() in _PRODUCTS and use.offset == 0)
        or (use.user.kind() in _TRANSPARENT and use.offset == 0 and _is_multiplied(use.user.output()))
        for use in value.uses()
    )


def _lead_past(graph: Graph, node: Node, chain: Chain) -> None:
    """Fixes the condition around a fast path so that the other branch is taken."""
    owner, number = chain[-1] if chain else (None, 0)
    if owner is None or owner.kind() != "prim::If" or _holds_fast_path(list(owner.blocks())[1 - number]):
        raise _refused(
            f"it was traced through a fast path, {node.kind().removeprefix('aten::')}, which computes attention in one kernel; "
            "trace it again after torch.backends.mha.set_fastpath_enabled(False), or script it"
        )
    # The first block is the one that is taken when the condition holds.
    (condition,) = insert_constants(graph, [number == 1], before=owner)
    owner.replaceInput(0, condition)


def _holds_fast_path(block: Any) -> bool:
    return any(node.kind() in _FAST_PATHS for node, _ in walk(block))


def _refused(why: str) -> Unsupported:
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"the attention of this torchscript model cannot be seen: {why}; grad-cam and vanilla-backprop need none",
        metadata={"rule": "attention", "kind": "torchscript"},
    )

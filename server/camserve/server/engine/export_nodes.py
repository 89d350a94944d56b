"""Reads and exchanges the nodes of an unflattened export.

Arrives: the module that `torch.export.unflatten` made, whose submodules each hold a graph that an interpreter walks at every
call. Exchanging a node's target for one forward therefore changes that forward and nothing else; no second module, no second copy
of the weights is needed. `export_relu.py` and `export_attention.py` use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from camserve.server.engine.program import ProgramKind
from camserve.server.errors import Reason, Unsupported

__all__ = ["exchanged", "nodes_of"]


def nodes_of(module: nn.Module) -> list[fx.Node]:
    """Every operator call in the graphs of an export, module by module."""
    return [node for graph, _ in _graphs(module) for node in graph.nodes if node.op == "call_function"]


@contextlib.contextmanager
def exchanged(
    module: nn.Module, replacement: Callable[[fx.Node], Callable[..., Any] | None], purpose: str
) -> Iterator[None]:
    """Calls other functions in the place of some nodes during the body.

    Args:
        module: an unflattened export.
        replacement: what to call instead of a node's operator, with the same arguments; None leaves the node alone.
        purpose: what this is for; named by the refusal.

    Raises:
        Unsupported: such a node is in a branch of control flow, which no interpreter walks.
    """
    changes: list[tuple[fx.Node, Callable[..., Any]]] = []
    for graph, is_branch in _graphs(module):
        for node in graph.nodes:
            function = replacement(node) if node.op == "call_function" else None
            if function is not None and is_branch:
                raise Unsupported(
                    Reason.METHOD_UNSUPPORTED_BY_MODEL,
                    f"{purpose} cannot change {node.target} in this {ProgramKind.EXPORT} program: it is inside a branch of "
                    "control flow (torch.cond and the like); export the model without it, or use grad-cam",
                    metadata={"operator": node.target, "kind": ProgramKind.EXPORT},
                )
            if function is not None:
                changes.append((node, function))
    before = [(node, node.target) for node, _ in changes]
    try:
        for node, function in changes:
            node.target = function
        yield
    finally:
        for node, target in before:
            node.target = target


def _graphs(module: nn.Module) -> Iterator[tuple[fx.Graph, bool]]:
    """Every graph once, and whether it is a branch's. Modules whose signature was preserved hold a graph for each call."""
    seen: set[int] = set()
    todo = list(module.modules())
    while todo:
        child = todo.pop(0)
        for inner in getattr(child, "_call_modules", []):
            todo += inner.modules()
        graph = getattr(child, "graph", None)
        if isinstance(graph, fx.Graph) and id(graph) not in seen:
            seen.add(id(graph))
            yield graph, isinstance(child, fx.GraphModule)

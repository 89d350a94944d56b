"""Lays the nested graphs of an unflattened export out as one graph, with the place where each module call ends.

Arrives: the module that `torch.export.unflatten` made. Leaves: a `Flat`, which `export_cut.py` cuts and `export_biases.py` reads.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.export.unflatten import InterpreterModule

from camserve.server.engine.program import TapName

__all__ = ["End", "Flat", "flatten"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Where a module call ends.

    Attributes:
        name: the call, with its index.
        value: what it returns: a node, or a tuple or list of nodes and constants.
        position: how many nodes of the flat graph come before.
    """

    name: TapName
    value: Any
    position: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """One graph.

    Attributes:
        nodes: in order of execution: first the inputs, no output. Attributes are named from the root.
        output: what the graph returns, of nodes and constants.
        ends: of every module call, in order of completion: children before their container.
        owners: by node, the path of the innermost module whose call made it, '' for the model itself.
    """

    nodes: Sequence[fx.Node]
    output: Any
    ends: Sequence[End]
    owners: Mapping[fx.Node, str]


def flatten(module: nn.Module) -> Flat | None:
    """Lays out an export; None where some module is not just a graph, as those whose call signature was preserved.

    Module calls are counted by path without the suffix (`relu@1`) that unflattening gives to further calls.
    """
    graph = fx.Graph()
    ends: list[End] = []
    owners: dict[fx.Node, str] = {}
    counts: collections.Counter[str] = collections.Counter()

    def lay(owner: nn.Module, prefix: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        values: dict[fx.Node, Any] = {}
        given = list(arguments)
        for node in owner.graph.nodes:  # type: ignore[union-attr]
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            match node.op:
                case "placeholder":
                    values[node] = given.pop(0) if given else options[node.target]
                    continue
                case "output":
                    return args[0]
                case "call_module":
                    child = owner.get_submodule(node.target)
                    if type(child) is not InterpreterModule:
                        raise _NotFlat
                    path = f"{prefix}{node.target}"
                    values[node] = lay(child, f"{path}.", args, kwargs)
                    name = _plain(path)
                    ends.append(End(name=TapName(name, counts[name]), value=values[node], position=len(graph.nodes)))
                    counts[name] += 1
                    continue
                case "get_attr":
                    made = graph.create_node("get_attr", f"{prefix}{node.target}")
                case _:
                    made = graph.create_node(node.op, node.target, args, kwargs)
            values[node] = made
            owners[made] = _plain(prefix.removesuffix("."))
        return None

    inputs = [
        graph.placeholder(node.name)
        for node in module.graph.nodes  # type: ignore[union-attr]
        if node.op == "placeholder"
    ]
    try:
        output = lay(module, "", inputs, {})
    except _NotFlat:
        return None
    return Flat(nodes=list(graph.nodes), output=output, ends=ends, owners=owners)


class _NotFlat(Exception):
    """A module is called that is no graph."""


def _plain(path: str) -> str:
    return ".".join(part.partition("@")[0] for part in path.split("."))

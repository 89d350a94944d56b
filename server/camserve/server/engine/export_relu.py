"""Gates every ReLU of an exported program during one forward, functional calls included: in a graph they are nodes as any other.

`ExportProgram.capture` enters `gated_nodes` around its forward. How nodes are exchanged is told in `export_nodes.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from camserve.server.engine.export_nodes import exchanged, nodes_of
from camserve.server.engine.hooked_relu import Gate, activation_of, gate_of, gated, without_gates
from camserve.server.engine.program import BackwardRule, ProgramKind

__all__ = ["gated_nodes"]


@contextlib.contextmanager
def gated_nodes(module: nn.Module, rule: BackwardRule) -> Iterator[tuple[Tensor, ...]]:
    """Gates every ReLU node for the forward in the body.

    Args:
        module: an unflattened export.
        rule: `GUIDED` or `DECONVNET`.

    Raises:
        Unsupported: there is no ReLU, or one is in a branch of control flow.
    """
    found = []

    def replacement(node: fx.Node) -> Callable[..., Any] | None:
        gate = gate_of(node.target, node.args, node.kwargs)
        if gate is None:
            return None
        found.append(node)
        return functools.partial(_gated, gate=gate, rule=rule)

    with exchanged(module, replacement, f"rule '{rule}'"):
        if not found:
            names = [activation_of(node.target) for node in nodes_of(module)]
            raise without_gates(rule, ProgramKind.EXPORT, [name for name in names if name])
        yield ()


def _gated(value: Tensor, *_limits: Any, gate: Gate, rule: BackwardRule, **_options: Any) -> Tensor:
    return gated(value, gate, rule)

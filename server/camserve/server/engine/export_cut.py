"""Cuts an exported program at a tap into two graphs of their own, so that the tail is just the nodes behind the tap.

Arrives: the flat graph (`export_flat.py`) and the place of the tap. Leaves: an `ExportCut`. `ExportProgram.cut` is the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.unflatten import UnflattenedModule
from torch.utils import _pytree as pytree

from camserve.server.engine.export_flat import Flat
from camserve.server.engine.hooked_rows import Copies, copies_of, doubled, shapes_of, unclear
from camserve.server.engine.hooks import plain_attention, tensors_of
from camserve.server.engine.program import ProgramKind, TapName
from camserve.server.engine.rerun import RerunCut

__all__ = ["ExportCut"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Crossing:
    """What crosses a cut.

    Attributes:
        inputs: the model's own; None once it was spread.
        values: of the nodes before the tap that nodes behind it use, in order.
        rerun: what crosses the cut that runs the model again, where values share memory that the tail writes to.
    """

    inputs: tuple[Tensor, ...] | None
    values: tuple[Any, ...] = ()
    rerun: Any = None


class ExportCut:
    """A `Cut` of an exported program.

    In-place operators behind the tap may write to memory that a value before it lies in under another name. Two graphs would not
    see that, so that such inputs are cut by running the model again (`rerun.py`).

    Args:
        module: the whole program.
        flat: its graph.
        place: the tap, with its call index.
        rerun: makes the other kind of cut.
    """

    def __init__(self, module: UnflattenedModule, flat: Flat, place: TapName, rerun: Callable[[], RerunCut]) -> None:
        self._module = module
        self._place = place
        self._make_rerun = rerun
        end = next(end for end in flat.ends if (end.name.path, end.name.call) == (place.path, place.call))
        tapped = end.value if place.output is None else end.value[int(place.output)]
        before, after = flat.nodes[: end.position], flat.nodes[end.position :]
        used = {node for later in after for node in later.all_input_nodes} | set(_nodes_in(flat.output))
        self._crossing = [node for node in before if node in used and node is not tapped and node.op != "get_attr"]
        self._front = _graph([], before, (tapped, tuple(self._crossing)))
        constants = [node for node in before if node in used and node.op == "get_attr"]
        self._tail = _graph([tapped, *self._crossing], [*constants, *after], flat.output)
        self._is_writing = any(_writes(node) for node in after)
        self._copies: dict[Any, tuple[Copies, ...]] = {}

    def front(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """Runs up to the tap without grad; returns the activation and the crossing.

        Raises:
            RuntimeError: the program was not exported for inputs of these sizes.
        """
        activation, values = self._run_front(inputs)
        kept = tuple(tensor.detach().clone() for tensor in inputs)
        if self._is_entangled(activation, values):
            activation, crossing = self._rerun.front(*inputs)
            return activation, _Crossing(inputs=kept, rerun=crossing)
        return activation.clone(), _Crossing(inputs=kept, values=values)

    def tail(self, activation: Tensor, crossing: Any) -> Any:
        """Runs the rest on `activation`, with a graph if it requires grad and gradients are enabled."""
        if crossing.rerun is not None:
            return self._rerun.tail(activation, crossing.rerun)
        values = (activation, *crossing.values)
        if self._is_writing:
            values = pytree.tree_map_only(Tensor, torch.clone, values)
        with_grad = torch.is_grad_enabled() and activation.requires_grad
        with torch.set_grad_enabled(with_grad), plain_attention():
            outputs = fx.Interpreter(self._module, graph=self._tail).run(*values, enable_io_processing=False)
        return pytree.tree_unflatten(outputs, _signature(self._module).out_spec)

    def spread(self, crossing: Any, rows: int) -> Any:
        """What crosses for `rows` copies of the one row that `front` was given.

        The first call for an input shape runs the front on two copies of the row, to find out what belongs to the row.

        Raises:
            Unsupported: it cannot be told, or the program was exported for one row only.
            ValueError: the crossing is not that of one row.
        """
        if crossing.inputs is None:
            raise ValueError("this crossing is spread already; spread the one that `front` returned")
        if crossing.rerun is not None:
            return _Crossing(inputs=None, rerun=self._rerun.spread(crossing.rerun, rows))
        key = shapes_of(crossing.inputs)
        if key not in self._copies:
            self._copies[key] = self._compare(crossing, doubled(crossing.inputs))
        pairs = zip(self._copies[key], crossing.values, strict=True)
        return _Crossing(inputs=None, values=tuple(copies.make(value, rows) for copies, value in pairs))

    @functools.cached_property
    def _rerun(self) -> RerunCut:
        return self._make_rerun()

    def _run_front(self, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
        with torch.no_grad(), plain_attention():
            own = [tensor.clone() for tensor in inputs]  # A model may normalise its input in place.
            flat = self._module.process_forward_inputs(*own)  # type: ignore[no-untyped-call]
            activation, values = fx.Interpreter(self._module, graph=self._front).run(*flat, enable_io_processing=False)
        return activation, values

    def _is_entangled(self, activation: Tensor, values: Sequence[Any]) -> bool:
        own = activation.untyped_storage().data_ptr()
        others = [tensor.untyped_storage().data_ptr() for tensor in tensors_of(values)]
        return own in others or (self._is_writing and len(set(others)) < len(others))

    def _compare(self, crossing: _Crossing, two_inputs: Sequence[Tensor]) -> tuple[Copies, ...]:
        advice = (
            "export the model with a dynamic batch, choose a later layer, or a method that does not resume the model"
        )
        two: Sequence[Any] | None = None
        with contextlib.suppress(RuntimeError):
            two = self._run_front(two_inputs)[1]
        if two is None:
            raise unclear(ProgramKind.EXPORT, self._place, "it does not run on two rows", advice)
        found = []
        for node, one, other in zip(self._crossing, crossing.values, two, strict=True):
            copies = copies_of(one, other)
            if copies is None:
                problem = f"it cannot be told what part of '{node.name}', made before the layer, belongs to the row"
                raise unclear(ProgramKind.EXPORT, self._place, problem, advice)
            found.append(copies)
        return tuple(found)


def _graph(inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], output: Any) -> fx.Graph:
    """A graph of its own that takes the values of `inputs` and runs `nodes`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(output, copies.__getitem__))
    return graph


def _nodes_in(value: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg(value, nodes.append)
    return nodes


def _writes(node: fx.Node) -> bool:
    """Whether an operator changes its arguments; foreign functions may."""
    schema = getattr(node.target, "_schema", None)
    is_plain = node.op != "call_function" or getattr(node.target, "__module__", "") in {"_operator", "math"}
    return bool(schema.is_mutable) if schema is not None else not is_plain


def _signature(module: UnflattenedModule) -> Any:
    return module.module_call_graph[0].signature

"""Surgery on marked graphs: the plain graph, the graph with taps in it, the two graphs of a cut.

Arrives: the marked graph of `script_graph.py`, which is only read; every operation works on a copy. Leaves: finished
graphs that hold no marks any more. `script.py` is the caller.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from camserve.server.engine.script_graph import (
    Block,
    Chain,
    Graph,
    Node,
    Value,
    copied,
    discard_unused,
    integer,
    marks,
    optional,
    tensor,
    tuple_of,
    unmark,
    walk,
)
from camserve.server.engine.script_memory import Memory
from camserve.server.engine.script_places import Place, contents

__all__ = ["CutGraphs", "Pick", "cut_graphs", "tapped_graph", "unmarked_graph"]

Pick: TypeAlias = tuple[int, str]
"""One tensor: the number of the call, and the key of one of its outputs ('' for a call that returns one tensor)."""


def unmarked_graph(marked: Graph) -> Graph:
    """The plain forward."""
    graph = copied(marked)
    _unmark_all(graph)
    return graph


def _unmark_all(graph: Graph) -> None:
    for mark, record, _ in marks(graph):
        unmark(mark, record)
    discard_unused(graph)


def tapped_graph(marked: Graph, picks: Sequence[Pick], known: Sequence[Place]) -> Graph:
    """A graph that returns `(outputs, (value at each pick, ...), (its version, ...))`; None for a pick in a branch not taken.

    The version is what torch counts up at every write: if it is another one after the forward, the capture was overwritten.

    The value is made to require grad where it is captured: before the earliest tap nothing does, so that this one becomes a leaf;
    at a later one it already does and stays in the graph, where asking again does nothing.
    """
    graph = copied(marked)
    captured: dict[Pick, Value] = {}
    versions: dict[Pick, Value] = {}
    for pick, (hook, slot, chain) in _opened(graph, picks, known).items():
        graph.setInsertPoint(slot)
        place, true, none = known[pick[0]], graph.insertConstant(True), graph.insertConstant(None)  # noqa: FBT003 - an IValue
        value = hook.output()
        if place.hazards.copy_capture:
            value = _insert(graph, "aten::clone", [value, none], before=slot)
        value = captured[pick] = _insert(graph, "aten::requires_grad_", [value, true], before=slot)
        if place.hazards.copy_onward:
            value = _insert(graph, "aten::clone", [value, none], before=slot)
        slot.replaceInput(0, value)
        version = _insert(graph, "aten::_version", [captured[pick]], before=slot, of_type=integer())
        captured[pick] = _carried_out(graph, captured[pick], chain)
        versions[pick] = _carried_out(graph, version, chain)
    values = [_packed(graph, [found[pick] for pick in picks]) for found in (captured, versions)]
    _return(graph, [*graph.outputs(), *values])
    _unmark_all(graph)
    return graph


def _opened(graph: Graph, picks: Sequence[Pick], known: Sequence[Place]) -> dict[Pick, tuple[Node, Node, Chain]]:
    """Makes room at each picked tensor: a *hook* node that gives it out and a *slot* node whose input goes on in its stead."""
    wanted: dict[int, list[str]] = collections.defaultdict(list)
    for number, key in picks:
        wanted[number].append(key)
    opened: dict[Pick, tuple[Node, Node, Chain]] = {}
    for mark, record, chain in marks(graph):
        number = record.i("number")
        if mark is None or number not in wanted:
            continue
        for key, (hook, slot) in _hooks(graph, mark, known[number], wanted[number]).items():
            opened[number, key] = (hook, slot, chain)
    return opened


def _hooks(graph: Graph, mark: Node, place: Place, keys: Sequence[str]) -> dict[str, tuple[Node, Node]]:
    """Hook and slot for some outputs of one call. Containers are rebuilt around the slots; a dict is written to in place."""
    value = mark.input()
    if place.holds == "tensor":
        element = _insert(graph, "aten::alias", [value], before=mark)
        mark.replaceInput(0, element)
        return {"": (element.node(), mark)}
    if place.holds == "dict":
        constants, made = contents(mark)[1], {}
        for key in keys:
            element = _insert(graph, "aten::__getitem__", [value, constants[key]], before=mark)
            made[key] = _gap(graph, element, before=mark)
            setter = graph.create("aten::_set_item", [value, constants[key], made[key][1].output()], 0)
            setter.insertBefore(mark)
        return made
    kind, types = (
        ("Tuple", value.type().elements()) if place.holds == "tuple" else ("List", [tensor()] * len(place.keys))
    )
    unpack = graph.create(f"prim::{kind}Unpack", [value], len(types))
    unpack.insertBefore(mark)
    elements = list(unpack.outputs())
    for element, element_type in zip(elements, types, strict=True):
        element.setType(element_type)
    made = {}
    for key in keys:
        made[key] = _gap(graph, elements[int(key)], before=mark)
        elements[int(key)] = made[key][1].output()
    # The same type again keeps the field names of a named tuple.
    mark.replaceInput(0, _insert(graph, f"prim::{kind}Construct", elements, before=mark, of_type=value.type()))
    return made


def _gap(graph: Graph, element: Value, *, before: Node) -> tuple[Node, Node]:
    hook = _insert(graph, "aten::alias", [element], before=before)
    return hook.node(), _insert(graph, "aten::alias", [hook], before=before).node()


def _carried_out(graph: Graph, value: Value, chain: Chain) -> Value:
    """Hands a value out of the branches it was computed in; the branches not taken hand out None."""
    of_type = value.type()
    for owner, number in reversed(chain):
        for i, block in enumerate(list(owner.blocks())):
            block.registerOutput(value if i == number else _none_at_end(graph, block))
        value = owner.addOutput()
        value.setType(optional(of_type))
    return value


def _none_at_end(graph: Graph, block: Block) -> Value:
    graph.setInsertPoint(block.returnNode())
    return graph.insertConstant(None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CutGraphs:
    """Both halves of a cut.

    Attributes:
        front: `(self, *inputs) -> (activation, *crossing)`.
        tail: `(self, activation, *crossing) -> outputs`.
        written: which of `(activation, *crossing)` the tail writes into.
        viewed: which of them the tail may view in another shape, so that they must lie in memory as the front left them.
        uncertain: some of them may share memory which the tail writes; if they do, it goes wrong on copies of them.
    """

    front: Graph
    tail: Graph
    written: tuple[bool, ...]
    viewed: tuple[bool, ...]
    uncertain: bool


def cut_graphs(marked: Graph, pick: Pick, known: Sequence[Place]) -> CutGraphs:
    """Cuts behind one pick, which must not be in a branch. Attributes and constants are on both sides and never cross."""
    front, tail = _Halves(marked, pick, known), _Halves(marked, pick, known)
    memory = Memory(tail.graph)
    written = tuple(memory.written_since(value, tail.live[0]) for value in tail.live)
    viewed = tuple(memory.viewed_since(value, tail.live[0]) for value in tail.live)
    uncertain = memory.share_written(tail.live, written)
    front.keep_front()
    tail.keep_tail()
    return CutGraphs(front=front.graph, tail=tail.graph, written=written, viewed=viewed, uncertain=uncertain)


class _Halves:
    """A copy of a graph with the line drawn: the nodes on both sides and the values that cross."""

    def __init__(self, marked: Graph, pick: Pick, known: Sequence[Place]) -> None:
        self.graph = copied(marked)
        ((hook, slot, _),) = _opened(self.graph, [pick], known).values()
        nodes = list(self.graph.nodes())
        split = next(i for i, node in enumerate(nodes) if node == hook) + 1
        self.front, self.tail = nodes[:split], nodes[split:]
        used = {value.unique() for node in self.tail for value in _inputs(node)}
        used |= {value.unique() for value in self.graph.outputs()}
        before = [*list(self.graph.inputs())[1:], *(value for node in self.front for value in node.outputs())]
        activation = hook.output()
        used.discard(activation.unique())
        crossing = [value for value in before if value.unique() in used and not _is_timeless(value.node())]
        self.live = [activation, *crossing]
        self.slot = slot

    def keep_front(self) -> None:
        _return(self.graph, self.live)
        for node in reversed(self.tail):
            node.destroy()
        _unmark_all(self.graph)

    def keep_tail(self) -> None:
        given = self.graph.inputs()
        count = len(list(given))
        for value in self.live:
            argument = self.graph.addInput()
            argument.setType(value.type())
            value.replaceAllUsesWith(argument)
        for node in reversed(self.front):
            # Dead code elimination alone would keep the front: in-place operators count as effects.
            if not _is_timeless(node):
                node.destroy()
        for i in reversed(range(1, count)):
            self.graph.eraseInput(i)
        _unmark_all(self.graph)


def _inputs(node: Node) -> list[Value]:
    """The values a node reads, those read in its blocks included."""
    return [
        *node.inputs(),
        *(value for block in node.blocks() for inner, _ in walk(block) for value in inner.inputs()),
        *(value for block in node.blocks() for value in _block_outputs(block)),
    ]


def _block_outputs(block: Block) -> list[Value]:
    nested = [inner for node, _ in walk(block) for inner in node.blocks()]
    return [value for one in [block, *nested] for value in one.outputs()]


def _is_timeless(node: Node) -> bool:
    """Whether a node gives the same on both sides of a cut: modules and their tensors, constants, what is never read."""
    return node.kind() in {"prim::GetAttr", "prim::Constant", "prim::Uninitialized"}


def _insert(graph: Graph, kind: str, inputs: Sequence[Value], *, before: Node, of_type: object = None) -> Value:
    node = graph.create(kind, list(inputs), 1)
    node.insertBefore(before)
    node.output().setType(of_type or tensor())
    return node.output()


def _packed(graph: Graph, values: Sequence[Value]) -> Value:
    return _insert(graph, "prim::TupleConstruct", values, before=graph.return_node(), of_type=tuple_of(values))


def _return(graph: Graph, values: Sequence[Value]) -> None:
    """Makes a graph return a tuple of these values instead of what it did."""
    packed = _packed(graph, values)
    for _ in list(graph.outputs()):
        graph.eraseOutput(0)
    graph.registerOutput(packed)

"""Surgery on marked graphs: which calls can be tapped, the graph with taps in it, the two graphs of a cut.

Arrives: the marked graph of `script_graph.py`, which is only read; every operation works on a copy. Leaves: `Place`s (one per
module call) and finished graphs that hold no marks any more. `script.py` is the caller.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeAlias

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
from camserve.server.engine.script_memory import Hazards, Memory

__all__ = ["CutGraphs", "Pick", "Place", "cut_graphs", "places", "tapped_graph", "unmarked_graph"]

Pick: TypeAlias = tuple[int, str]
"""One tensor: the number of the call, and the key of one of its outputs ('' for a call that returns one tensor)."""

Holds: TypeAlias = Literal["tensor", "tuple", "list", "dict", "other"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One module call in the graph.

    Attributes:
        path: dotted module path.
        number: of the call among all calls of the graph.
        holds: what the call returns.
        keys: of the tensors in a container, in order.
        conditional: it sits in a branch that an input may not take.
        hazards: what a tap here has to mind.
        refusal: why it cannot be tapped, or ''.
    """

    path: str
    number: int
    holds: Holds
    keys: tuple[str, ...] = ()
    conditional: bool = False
    hazards: Hazards = dataclasses.field(default_factory=Hazards)
    refusal: str = ""


def places(graph: Graph, memory: Memory) -> list[Place]:
    """Every module call of a marked graph, in order of completion: children before their container."""
    return [_place(number, mark, record, chain, memory) for number, (mark, record, chain) in enumerate(marks(graph))]


def _place(number: int, mark: Node | None, record: Node, chain: Chain, memory: Memory) -> Place:
    holds, keys = ("other", dict[str, Value]()) if mark is None else _contents(mark)
    kind = record.input().type().annotation_str
    hazards, refusal = Hazards(), ""
    if mark is None and kind == "NoneType":
        refusal = (
            "it returns nothing (a trace records nothing of a layer that hands on its input); tap the layer before it"
        )
    elif mark is None or holds == "other":
        refusal = f"it returns {kind}; only a tensor, or one in a tuple, list or dict, can be tapped"
    elif holds != "tensor" and not keys:
        refusal = f"it returns {kind}, and which tensors that holds is only known while it runs"
    elif any(owner.kind() == "prim::Loop" for owner, _ in chain):
        refusal = "it is called in a loop whose length depends on the input, so its calls cannot be told apart"
    else:
        hazards = memory.hazards(mark, number)
    return Place(
        path=record.s("path"),
        number=number,
        holds=holds,
        keys=tuple(keys),
        conditional=bool(chain),
        hazards=hazards,
        refusal=refusal,
    )


def _contents(mark: Node) -> tuple[Holds, dict[str, Value]]:
    """What a call returns and the keys of its tensors (a dict's with their constants), as the graph tells without running."""
    value = mark.input()
    match value.type().kind(), value.type().annotation_str:
        case "TensorType", _:
            return "tensor", {}
        case "TupleType", _:
            elements = enumerate(value.type().elements())
            return "tuple", {str(i): value for i, element in elements if element.kind() == "TensorType"}
        case "ListType", "List[Tensor]":
            return "list", {str(i): value for i in range(_length(mark))}
        case "DictType", text if text.endswith(", Tensor]"):
            return "dict", _keys(mark)
        case _:
            return "other", {}


def _maker(value: Value) -> Node:
    """The node that made a container; inner calls hand on the one they got."""
    while value.node().kind() == "prim::unchecked_cast":
        value = value.node().input()
    return value.node()


def _users(value: Value) -> list[Node]:
    """Nodes that use a value, itself or behind a mark."""
    users: list[Node] = []
    for use in value.uses():
        users.append(use.user)
        if use.user.kind() == "prim::unchecked_cast":
            users += _users(use.user.output())
    return users


def _length(mark: Node) -> int:
    """Length of a returned list, or 0 if it is not still what a list literal made it."""
    maker = _maker(mark.input())
    reads = {"prim::unchecked_cast", "prim::Print", "aten::__getitem__", "aten::len", "prim::ListUnpack", "aten::cat"}
    fixed = all(user.kind() in reads or mark.isBefore(user) for user in _users(maker.output()))
    return maker.inputsSize() if maker.kind() == "prim::ListConstruct" and fixed else 0


def _keys(mark: Node) -> dict[str, Value]:
    """Keys of a returned dict: those of its literal, then those set on every path before it is returned."""
    maker = _maker(mark.input())
    if maker.kind() != "prim::DictConstruct" and (maker.kind() != "aten::dict" or maker.inputsSize() > 0):
        return {}
    setters = [user for user in _users(maker.output()) if user.kind() == "aten::_set_item" and user.isBefore(mark)]
    constants = list(maker.inputs())[0::2]
    constants += [node.inputsAt(1) for node in maker.owningBlock().nodes() if any(node == setter for setter in setters)]
    return {str(constant.toIValue()): constant for constant in constants if constant.toIValue() is not None}


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
        constants, made = _contents(mark)[1], {}
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
        uncertain: some of them may share memory which the tail writes; if they do, it goes wrong on copies of them.
    """

    front: Graph
    tail: Graph
    written: tuple[bool, ...]
    uncertain: bool


def cut_graphs(marked: Graph, pick: Pick, known: Sequence[Place]) -> CutGraphs:
    """Cuts behind one pick, which must not be in a branch. Attributes and constants are on both sides and never cross."""
    front, tail = _Halves(marked, pick, known), _Halves(marked, pick, known)
    memory = Memory(tail.graph)
    written = tuple(memory.written_since(value, tail.live[0]) for value in tail.live)
    uncertain = memory.share_written(tail.live, written)
    front.keep_front()
    tail.keep_tail()
    return CutGraphs(front=front.graph, tail=tail.graph, written=written, uncertain=uncertain)


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
    """Whether a node gives the same on both sides of a cut: modules and their tensors, constants."""
    return node.kind() in {"prim::GetAttr", "prim::Constant"}


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

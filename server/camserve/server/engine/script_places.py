"""Which module calls of a TorchScript graph can be tapped, and what each returns, as the graph tells without running.

Arrives: the marked graph of `script_graph.py`, which is only read. Leaves: one `Place` per call, for `script.py` to list and
`script_taps.py` to operate on.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from camserve.server.engine.script_graph import Chain, Graph, Node, Value, marks
from camserve.server.engine.script_memory import Hazards, Memory

__all__ = ["Place", "contents", "places"]

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
    holds: Holds = "other"
    keys: dict[str, Value] = {}
    if mark is not None:
        holds, keys = contents(mark)
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


def contents(mark: Node) -> tuple[Holds, dict[str, Value]]:
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

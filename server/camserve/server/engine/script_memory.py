"""Which values of a TorchScript graph share memory, and what is written in place when.

Arrives: the marked graph of `script_graph.py`. Leaves: for one module call, which copies a tap there needs, or why it would be
wrong. `script_places.py` and `script_taps.py` ask. Taps stay exact because of this, and cheap: most layers need no copy at all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from camserve.server.engine.script_graph import Block, Graph, Node, Value, written_arguments

__all__ = ["Hazards", "Memory"]

# These fail, or see other numbers, where a tensor is laid out in another way than expected; `reshape` copies instead.
_VIEWS = frozenset(
    {"aten::view", "aten::view_as", "aten::_unsafe_view", "aten::as_strided", "aten::unflatten", "aten::_reshape_alias"}
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hazards:
    """What a tap at one value has to mind. Nothing, for most.

    Attributes:
        copy_capture: the value lies in memory that is the caller's or that something later overwrites.
        copy_onward: something later writes into the value itself.
        uncertain: other values may share the memory, with writes and reads in turn; if they do, a tap parts what the model
            shares and changes its outputs. Containers are often suspected wrongly, so this is to be tried, not refused.
    """

    copy_capture: bool = False
    copy_onward: bool = False
    uncertain: bool = False


class Memory:
    """The writes and the life times of a graph's values, over torch's alias analysis.

    Args:
        graph: marked and numbered; must not change while this is in use.
    """

    def __init__(self, graph: Graph) -> None:
        self._aliases = graph.alias_db()
        self._inputs = [value for value in graph.inputs() if _holds_tensors(value)]
        self._values: dict[int, tuple[int, Value]] = {value.unique(): (-1, value) for value in self._inputs}
        self._last_use: dict[int, int] = {}
        self._writes: list[tuple[int, Value | None]] = []
        self._views: list[tuple[int, Value]] = []
        self._records: dict[int, int] = {}
        self._time = 0
        self._read(graph)

    def _read(self, block: Block) -> None:
        """Numbers the nodes of a block in order, nested blocks within; a block's outputs are used at its end."""
        for node in block.nodes():
            self._time += 1
            if node.kind() == "prim::Print" and node.hasAttribute("number"):
                self._records[node.i("number")] = self._time
                continue
            self._last_use |= {value.unique(): self._time for value in node.inputs()}
            if node.kind() in _VIEWS:
                self._views.append((self._time, node.inputsAt(0)))
            written = written_arguments(node)
            self._writes += [(self._time, None)] if written is None else [(self._time, value) for value in written]
            entered = self._time
            for inner in node.blocks():
                self._values |= {
                    value.unique(): (self._time, value) for value in inner.inputs() if _holds_tensors(value)
                }
                self._read(inner)
            if node.kind() == "prim::Loop":
                # What one round reads the next round reads again.
                self._last_use |= {name: self._time for name, used in self._last_use.items() if used > entered}
            self._values |= {value.unique(): (self._time, value) for value in node.outputs() if _holds_tensors(value)}
        self._time += 1
        self._last_use |= {value.unique(): self._time for value in block.outputs()}

    def writes_inputs(self) -> bool:
        """Whether a forward writes into the tensors it is given."""
        return any(self._reaches(written, value) for _, written in self._writes for value in self._inputs)

    def written_since(self, value: Value, event: Value) -> bool:
        """Whether anything behind the birth of `event` writes into the memory of `value`."""
        born = self._values[event.unique()][0]
        return _holds_tensors(value) and any(
            time > born and self._reaches(written, value) for time, written in self._writes
        )

    def viewed_since(self, value: Value, event: Value) -> bool:
        """Whether anything behind the birth of `event` may view the memory of `value` in another shape."""
        born = self._values[event.unique()][0]
        return _holds_tensors(value) and any(
            time > born and self._aliases.may_contain_alias(viewed, value) for time, viewed in self._views
        )

    def share_written(self, values: Sequence[Value], written: Sequence[bool]) -> bool:
        """Whether a written one of these values shares memory with another of them."""
        tensors = [
            (value, is_written) for value, is_written in zip(values, written, strict=True) if _holds_tensors(value)
        ]
        return any(
            (first[1] or second[1]) and self._aliases.may_contain_alias(first[0], second[0])
            for first, second in itertools.combinations(tensors, 2)
        )

    def hazards(self, mark: Node, number: int) -> Hazards:
        """What a tap on one call that returns tensors has to mind."""
        value, own, here = mark.input(), mark.output().unique(), self._records[number]
        given = any(self._aliases.may_contain_alias(value, other) for other in self._inputs)
        writes = [time for time, written in self._writes if time > here and self._reaches(written, value)]
        if not writes:
            return Hazards(copy_capture=given)
        has_other_names, last_use_onward = False, here
        for unique, last_use in self._last_use.items():
            if last_use <= here or unique not in self._values:
                continue
            born, name = self._values[unique]
            if self._aliases.may_contain_alias(name, value):
                if born > here or unique == own:
                    last_use_onward = max(last_use_onward, last_use)
                else:
                    has_other_names = True
        if not has_other_names:
            return Hazards(copy_capture=given, copy_onward=True)
        if last_use_onward < min(writes):
            return Hazards(copy_capture=True)
        return Hazards(copy_capture=True, copy_onward=True, uncertain=True)

    def _reaches(self, written: Value | None, value: Value) -> bool:
        return written is None or self._aliases.may_contain_alias(written, value)


def _holds_tensors(value: Value) -> bool:
    return "Tensor" in value.type().annotation_str

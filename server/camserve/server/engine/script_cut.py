"""A TorchScript program cut in two at one tap: both halves compiled, and what crosses between them.

`script.py` makes one for each tap that is asked for and keeps it; the graphs come from `script_taps.py`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camserve.server.engine import script_graph as graphs
from camserve.server.engine.program import TapName
from camserve.server.engine.script_form import FUNCTIONS_KEPT, unusable
from camserve.server.engine.script_spread import Ambiguous, Crossing, Growth, grown, growth_of
from camserve.server.engine.script_taps import CutGraphs
from camserve.server.engine.script_values import copied, is_same

__all__ = ["SHARED", "Host", "ScriptCut"]

SHARED = (
    "the value shares memory with another value of the model, and one of the two is written in place while the other is "
    "still in use; tap the layer before it"
)
"""Why a place that can be named can be neither tapped nor cut."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """How functions of a program are run.

    Attributes:
        call: runs a compiled function on its arguments.
        arranged: the arguments of a forward for the given inputs.
        run: the whole forward.
    """

    call: Callable[[Callable[..., Any], Sequence[Any]], Any]
    arranged: Callable[[Sequence[Tensor]], Sequence[Any]]
    run: Callable[..., Any]


class ScriptCut:
    """A `Cut` of a TorchScript program.

    Args:
        host: runs functions of the program that was cut.
        tap: where.
        halves: the two graphs and what they write.

    Attributes:
        constants: weights in the front's graph, which a fused one has of its own.
    """

    def __init__(self, host: Host, tap: TapName, halves: CutGraphs) -> None:
        self._host = host
        self._tap = tap
        self.constants = tuple(graphs.constant_tensors(halves.front).values())
        self._front = graphs.compiled("front", halves.front)
        self._tail = graphs.compiled("tail", halves.tail)
        self._written = halves.written
        self._viewed = halves.viewed
        self._is_verified = not halves.uncertain
        self._growths: collections.OrderedDict[tuple[torch.Size, ...], tuple[Growth, ...]] = collections.OrderedDict()

    def front(self, *inputs: Tensor) -> tuple[Tensor, Crossing]:
        """Runs up to the tap without grad.

        Returns:
            The activation, shape (b, ...), and the crossing.

        Raises:
            Unsupported: the halves do not add up to the program, because its values share memory across the cut. Only
                where that is suspected, and only the first time, both halves and the whole are run to find out.
        """
        host = self._host
        with torch.no_grad():
            activation, *values = host.call(self._front, host.arranged(inputs))
            crossing = Crossing(values=tuple(values), inputs=inputs)
            if not self._is_verified:
                if not is_same(self.tail(activation, crossing), host.run(*inputs)):
                    raise unusable(self._tap, SHARED)
                self._is_verified = True
        return activation, crossing

    def tail(self, activation: Tensor, crossing: Crossing) -> Any:
        """Runs the rest, with grad if it is enabled where this is called. What the tail would write into is copied first."""
        arguments = zip([activation, *crossing.values], self._written, strict=True)
        return self._host.call(self._tail, [copied(value) if written else value for value, written in arguments])

    def spread(self, crossing: Crossing, rows: int) -> Crossing:
        """What crosses for `rows` copies of the one row that `front` was given.

        The first time for a shape the front runs once more, on two copies of the row, to see what grows with their number.
        Rows share memory; nothing is copied but what the tail views in another shape.

        Raises:
            Unsupported: a crossing value neither grows with the rows nor stays the same.
            ValueError: there are no rows, or the crossing is not that of one row.
        """
        if rows < 1:
            raise ValueError(f"{rows} rows; at least 1 is allowed")
        if not crossing.values:
            return crossing
        if not crossing.inputs or {tuple(value.shape[:1]) for value in crossing.inputs} != {(1,)}:
            raise ValueError("only the crossing of a single row, as `front` returned it, can be spread")
        growths = self._growths_of(crossing)
        parts = zip(crossing.values, growths, self._viewed[1:], strict=True)
        return Crossing(
            values=tuple(grown(value, growth, rows, is_expanded=not viewed) for value, growth, viewed in parts)
        )

    def _growths_of(self, crossing: Crossing) -> tuple[Growth, ...]:
        """How each crossing value depends on the number of rows."""
        shapes = tuple(value.shape for value in crossing.inputs)
        if shapes not in self._growths:
            with torch.no_grad():
                doubled = [torch.cat([value, value]) for value in crossing.inputs]
                _, *twice = self._host.call(self._front, self._host.arranged(doubled))
            try:
                self._growths[shapes] = tuple(map(growth_of, crossing.values, twice))
            except Ambiguous as error:
                raise unusable(
                    self._tap,
                    f"what its copies share cannot be told, because {error} crosses from before it to behind it; choose the last "
                    "layer of a stage, behind which nothing crosses, or a method that does not ablate",
                ) from error
            if len(self._growths) > FUNCTIONS_KEPT:
                self._growths.popitem(last=False)
        return self._growths[shapes]

"""One form of a TorchScript program: a marked graph, the names of its calls and the functions compiled from it.

A program has a plain form, and others made from it: one for each backward rule (`script_rules.py`, `script_attention.py`) and, of
each of these, one in which operators have names too. Arrives: a finished marked graph. Leaves: picks for names, functions for
picks. `script.py` keeps the forms and calls the functions.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from camserve.server.engine import script_graph as graphs
from camserve.server.engine.program import Call, TapName
from camserve.server.engine.script_memory import Hazards, Memory
from camserve.server.engine.script_places import Place, places
from camserve.server.engine.script_taps import Pick, tapped_graph, unmarked_graph
from camserve.server.errors import NotFound, Reason, Unsupported

__all__ = ["FUNCTIONS_KEPT", "Form", "listed", "unusable"]

# A compiled function holds a graph, not weights: some hundred kilobytes. Requests use few combinations of layers.
FUNCTIONS_KEPT = 32
_NAMES_IN_A_MESSAGE = 12


class Form:
    """A marked graph that can be asked for its calls by name and for functions that capture some of them.

    Args:
        graph: marked and numbered; never changed afterwards.
        modules: paths of all modules of the archive, to tell a layer that is never called from one that does not exist.

    Attributes:
        graph: as given.
        places: its calls, by number.
        calls: the same, as `Program.calls` lists them.
        writes_inputs: whether a forward writes into the tensors it is given.
        verified: picks whose capture was seen to leave the outputs as they are, where that was uncertain.
    """

    def __init__(self, graph: graphs.Graph, modules: Collection[str]) -> None:
        self.graph = graph
        memory = Memory(graph)
        self.places: list[Place] = places(graph, memory)
        self.writes_inputs = memory.writes_inputs()
        self.calls, self._at = _numbered(self.places)
        self.verified: set[tuple[Pick, ...]] = set()
        self._modules = modules
        self._tapped: collections.OrderedDict[tuple[Pick, ...], Callable[..., Any]] = collections.OrderedDict()

    @functools.cached_property
    def plain(self) -> Callable[..., Any]:
        """The forward, `(self, *inputs) -> outputs`."""
        return graphs.compiled("forward", unmarked_graph(self.graph))

    def tapped(self, picks: tuple[Pick, ...]) -> Callable[..., Any]:
        """The forward that also returns the value at each pick, as `tapped_graph` tells."""
        if picks not in self._tapped:
            self._tapped[picks] = graphs.compiled("tapped", tapped_graph(self.graph, picks, self.places))
            if len(self._tapped) > FUNCTIONS_KEPT:
                self._tapped.popitem(last=False)
        self._tapped.move_to_end(picks)
        return self._tapped[picks]

    def be_careful(self, picks: Sequence[Pick]) -> None:
        """Taps these calls with every copy from now on: an operator shares memory although its schema denies it."""
        for number, _ in picks:
            hazards = Hazards(copy_capture=True, copy_onward=True, uncertain=True)
            self.places[number] = dataclasses.replace(self.places[number], hazards=hazards)
        self._tapped.clear()

    def pick(self, tap: TapName) -> Pick:
        """Finds the tensor a tap names.

        Raises:
            NotFound: a module, a call or an output of this name does not exist.
            Unsupported: it exists but cannot be tapped, or the name leaves open which of several tensors is meant.
        """
        numbers = self._at.get(tap.path)
        if numbers is None:
            raise self._missing(tap)
        if tap.call is not None and tap.call >= len(numbers):
            names = listed([f"{tap.path}#{index}" for index in range(len(numbers))])
            raise _not_found(tap, f"'{tap.path}' is called {len(numbers)} times: {names}")
        place = self.places[numbers[-1 if tap.call is None else tap.call]]
        if place.refusal:
            raise unusable(tap, f"{place.refusal}; {self.others(tap)}")
        names = listed([str(TapName(tap.path, tap.call, key)) for key in place.keys])
        if tap.output is None and place.keys:
            raise unusable(tap, f"it returns several tensors; name one: {names}")
        if tap.output is not None and tap.output not in place.keys:
            raise _not_found(tap, f"known: {names}" if names else f"it returns one tensor; write '{tap.path}'")
        return place.number, tap.output or ""

    def name(self, number: int) -> TapName:
        """What a call is called: its path alone if no other call has it."""
        call = self.calls[number]
        return TapName(call.path, call.index if len(self._at[call.path]) > 1 else None)

    def every(self, tap: TapName) -> list[TapName]:
        """Each call of a path by its own name."""
        return [TapName(tap.path, index) for index in range(len(self._at.get(tap.path, ())))]

    def others(self, tap: TapName) -> str:
        """Names of other layers, for a message about this one."""
        tappable = list(dict.fromkeys(place.path for place in self.places if not place.refusal))
        near = difflib.get_close_matches(tap.path, [path for path in tappable if path != tap.path], n=5, cutoff=0.5)
        hint = f"near names: {listed(near)}; " if near else ""
        return f"{hint}layers that can be tapped: {listed(sorted(tappable, key=lambda path: path.count('.')))}"

    def _missing(self, tap: TapName) -> NotFound | Unsupported:
        if tap.path in self._modules:
            return unusable(
                tap,
                "the forward never calls it: it holds layers, is unused, or does nothing that a trace records",
            )
        return _not_found(tap, self.others(tap))


def unusable(tap: TapName, why: str) -> Unsupported:
    """The refusal of a layer that exists."""
    return Unsupported(Reason.LAYER_UNUSABLE, f"layer '{tap}' cannot be tapped: {why}", metadata={"layer": tap})


def listed(names: Sequence[str]) -> str:
    """Names for a message, capped."""
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def _not_found(tap: TapName, what: str) -> NotFound:
    return NotFound(Reason.LAYER_NOT_FOUND, f"layer '{tap}' does not exist; {what}", metadata={"layer": tap})


def _numbered(known: Sequence[Place]) -> tuple[tuple[Call, ...], Mapping[str, Sequence[int]]]:
    """The calls with their index, and for each path the numbers of its calls."""
    at: dict[str, list[int]] = collections.defaultdict(list)
    calls = []
    for place in known:
        calls.append(Call(path=place.path, index=len(at[place.path]), outputs=place.keys, refusal=place.refusal))
        at[place.path].append(place.number)
    return tuple(calls), dict(at)

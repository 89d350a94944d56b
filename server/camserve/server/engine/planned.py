"""A program served by a faster form of itself wherever that form can do what is asked.

`plans.py` makes one when a rewritten form passed its trial; passes, cuts and scores then run on that form. What it cannot do goes
to the program as loaded: layers that were folded away, other backward rules, the biases, and all questions about what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from camserve.server.engine.program import (
    ATTENTION,
    INPUT,
    BackwardRule,
    Call,
    Capture,
    Cut,
    Digests,
    Program,
    ProgramKind,
    TapName,
)

__all__ = ["ORIGINAL", "REWRITTEN", "PlannedProgram", "Rewritable", "Rewritten"]

ORIGINAL, REWRITTEN = "original", "rewritten"
"""The two forms; see `PlannedProgram.form_of`."""


class Rewritable(Program, Protocol):
    """A program as loaded."""

    def rewritten(self, inputs: Sequence[Tensor], *, channels_last: bool) -> Rewritten | None:
        """A form of it that is expected to be faster: constants folded and, if asked, weights laid out channels last.

        Args:
            inputs: of one forward, for programs whose calls only a forward shows.
            channels_last: whether inputs of four axes will be laid out so.

        Returns:
            None if there is nothing to rewrite.
        """
        ...


class Rewritten(Program, Protocol):
    """A rewritten form of a program: its values differ from the original's in their last bits."""

    def keeps(self, tap: TapName) -> bool:
        """Whether there still is such a place and it holds what it did."""
        ...


class PlannedProgram:
    """A `Program` of two forms.

    A pass runs on one of them. Rows that need a layer which the rewritten form lacks must not ride with others, lest those
    get other bits because of them: `form_of` tells which form a request needs, and the planner groups by it.

    Args:
        original: as loaded.
        rewritten: made from it.
        is_channels_last: whether inputs of four axes are laid out channels last for it.
    """

    def __init__(self, original: Program, rewritten: Rewritten, *, is_channels_last: bool) -> None:
        self.original = original
        self._rewritten = rewritten
        self._is_channels_last = is_channels_last

    def form_of(self, taps: Iterable[TapName]) -> str:
        """Which form runs a pass that captures these taps: `REWRITTEN` if that has them all."""
        asked = (tap for tap in taps if tap not in (INPUT, ATTENTION))
        return REWRITTEN if all(self._rewritten.keeps(tap) for tap in asked) else ORIGINAL

    @property
    def kind(self) -> ProgramKind:
        """The file's kind."""
        return self.original.kind

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.original.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype it computes in."""
        return self.original.dtype

    def calls(self) -> Sequence[Call]:
        """Every call of the program as loaded; all of them can be tapped, some only there."""
        return self.original.calls()

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers as loaded."""
        return self.original.tensors()

    def digests(self) -> Digests:
        """Of the program as loaded."""
        return self.original.digests()

    def biases(self) -> Mapping[TapName, Tensor]:
        """Of the program as loaded, whose layers they belong to."""
        return self.original.biases()

    def run(self, *inputs: Tensor) -> Any:
        """One forward of the rewritten form."""
        return self._rewritten.run(*self._laid_out(inputs))

    def capture(
        self,
        taps: Sequence[TapName],
        *inputs: Tensor,
        differentiable: bool = True,
        rule: BackwardRule = BackwardRule.PLAIN,
    ) -> Capture:
        """One forward of the form that has all taps; another rule than the plain one is applied to the program as loaded."""
        if rule is not BackwardRule.PLAIN or self.form_of(taps) == ORIGINAL:
            return self.original.capture(taps, *inputs, differentiable=differentiable, rule=rule)
        return self._rewritten.capture(taps, *self._laid_out(inputs), differentiable=differentiable)

    def cut(self, tap: TapName) -> Cut:
        """Cuts the form that has the tap."""
        if self.form_of([tap]) == ORIGINAL:
            return self.original.cut(tap)
        return _LaidOutCut(self._rewritten.cut(tap), self._laid_out)

    def _laid_out(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if not self._is_channels_last:
            return list(inputs)
        return [value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value for value in inputs]


class _LaidOutCut:
    """A `Cut` whose front is given its inputs in the layout of its program."""

    def __init__(self, cut: Cut, laid_out: Any) -> None:
        self._cut = cut
        self._laid_out = laid_out
        self.tail = cut.tail
        self.spread = cut.spread

    def front(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """Runs up to the tap without grad."""
        return self._cut.front(*self._laid_out(inputs))

"""A program served by faster forms of itself wherever these can do what is asked.

`plans.py` makes one when a rewritten form passed its trial; passes, cuts and scores then run on that form, those that tap only
the default layer on a fused one, if that is faster still. What they cannot do goes to the program as loaded: layers that were
folded away, other backward rules, the biases, and all questions about what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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

__all__ = ["FUSED", "ORIGINAL", "REWRITTEN", "PlannedProgram", "Rewritable", "Rewritten"]

ORIGINAL, REWRITTEN, FUSED = "original", "rewritten", "fused"
"""The forms; see `PlannedProgram.form_of`."""


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

    def fused(self, tap: TapName) -> Cut | None:
        """A cut at one tap whose front has no derivative and is expected to be faster; None where there is no such thing."""
        ...

    def keeps(self, tap: TapName) -> bool:
        """Whether there still is such a place and it holds what it did."""
        ...


class PlannedProgram:
    """A `Program` of two or three forms.

    A pass runs on one of them. Rows that need another form than others must not ride with them, lest those get other bits
    because of them: `form_of` tells which form a request needs, and the planner groups by it.

    Args:
        original: as loaded.
        rewritten: made from it.
        is_channels_last: whether inputs of four axes are laid out channels last for it.
        fused: a cut of the rewritten form whose front is fused; passes that tap nothing but its place run on it.
        fused_at: the names of that place.
    """

    def __init__(
        self,
        original: Program,
        rewritten: Rewritten,
        *,
        is_channels_last: bool,
        fused: Cut | None = None,
        fused_at: Collection[TapName] = (),
    ) -> None:
        self.original = original
        self.rewritten = rewritten
        self.is_channels_last = is_channels_last
        self._fused = fused
        self._fused_at = frozenset(fused_at)

    def form_of(self, taps: Iterable[TapName]) -> str:
        """Which form runs a pass that captures these taps: the fastest that has them all."""
        asked = [tap for tap in taps if tap != ATTENTION]
        if self._fused is not None and self._fused_at.issuperset(asked):
            return FUSED
        return REWRITTEN if all(self.rewritten.keeps(tap) for tap in asked if tap != INPUT) else ORIGINAL

    def fused_tensors(self) -> Sequence[Tensor]:
        """Weights that the fused form holds besides; they may be laid out as only its library knows."""
        return getattr(self._fused, "constants", ())

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

    @property
    def hooks(self) -> int:
        """On the modules of all its forms."""
        return self.original.hooks + self.rewritten.hooks

    def digests(self) -> Digests:
        """Of the program as loaded."""
        return self.original.digests()

    def biases(self) -> Mapping[TapName, Tensor]:
        """Of the program as loaded, whose layers they belong to."""
        return self.original.biases()

    def run(self, *inputs: Tensor) -> Any:
        """One forward of the fastest form."""
        if self._fused is None:
            return self.rewritten.run(*self._laid_out(inputs))
        with torch.no_grad():
            return self._fused.tail(*self._fused.front(*self._laid_out(inputs)))

    def capture(
        self,
        taps: Sequence[TapName],
        *inputs: Tensor,
        differentiable: bool = True,
        rule: BackwardRule = BackwardRule.PLAIN,
    ) -> Capture:
        """One forward of the form that has all taps; another rule than the plain one is applied to the program as loaded."""
        form = ORIGINAL if rule is not BackwardRule.PLAIN else self.form_of(taps)
        if form == ORIGINAL:
            return self.original.capture(taps, *inputs, differentiable=differentiable, rule=rule)
        # With a graph, if there is to be one: an input that requires grad keeps it through the change of layout.
        with torch.set_grad_enabled(differentiable):
            laid_out = self._laid_out(inputs)
        if form == FUSED and self._fused is not None and not any(value.requires_grad for value in inputs):
            activation, crossing = self._fused.front(*laid_out)
            activation.requires_grad_(differentiable)
            with torch.set_grad_enabled(differentiable):
                outputs = self._fused.tail(activation, crossing)
            return Capture(outputs=outputs, activations=dict.fromkeys(taps, activation))
        return self.rewritten.capture(taps, *laid_out, differentiable=differentiable)

    def cut(self, tap: TapName) -> Cut:
        """Cuts the form that has the tap."""
        match self.form_of([tap]):
            case "original":
                return self.original.cut(tap)
            case "fused" if self._fused is not None:
                return _LaidOutCut(self._fused, self._laid_out)
        return _LaidOutCut(self.rewritten.cut(tap), self._laid_out)

    def _laid_out(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if not self.is_channels_last:
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

"""One row, one target and one layer, for an amplified method that tries things out on the model: the engine's `Scene`.

`amplification.py` makes one for each layer of a spec and hands it to the method. Nothing is kept between calls but what the row
itself gave. How many rows are tried at once follows from shapes alone, never from the clock: the number of rows moves the last
bits of float32 results, and a map must come out the same when it is made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods import Evidence, Need, Reads
from camserve.server.engine.evidence import differentiable, evidence_at
from camserve.server.engine.graph import Gradients, capture_graph, is_device_failure
from camserve.server.engine.layout import Layout, LayoutKind, channels_first
from camserve.server.engine.mapping import class_weight
from camserve.server.engine.pace import MOST_TAIL_ROWS
from camserve.server.engine.plan import Ask, PassModel, rule_of
from camserve.server.engine.program import INPUT, BackwardRule, Cut
from camserve.server.engine.readouts import Aim, read
from camserve.server.errors import CamserveError, ExecutionFailed, Reason, Unsupported
from camserve.server.jobs import Parameters, Profile

__all__ = ["RowScene"]

_T = TypeVar("_T")

# An ablated copy of the activation for each row: enough rows to keep the device busy, few enough to stay in its cache.
_TAIL_BYTES: Final = 16 * 2**20


class RowScene:
    """A `Scene` over a program. See `cam.methods.Scene` for what each member means.

    Args:
        model: what runs.
        ask: the spec, settled.
        aim: the one of its aims that is tried.
        inputs: the row, batch axis of one, on the model's device and in its dtype; further inputs behind it.
        place: which layer of the spec, for methods that read layers.
    """

    def __init__(self, model: PassModel, ask: Ask, aim: Aim, inputs: Sequence[Tensor], place: int = 0) -> None:
        self._model = model
        self._ask = ask
        self._aim = aim
        self._row = tuple(inputs)
        self._is_layered = ask.method.reads is Reads.LAYERS
        self._tap = ask.taps[place]
        self._layout: Layout | None = ask.layouts[place] if self._is_layered else None
        self._front: tuple[Cut | None, Tensor, Any] | None = None
        self._score: float | None = None
        self._gradient: Tensor | None = None

    @property
    def inputs(self) -> Float[Tensor, "1 channels *input"]:
        """The row as the model took it."""
        return self._row[0]

    @property
    def activation(self) -> Float[Tensor, "1 c *space"]:
        """A at the layer, channels first; the input for methods that read that."""
        if self._layout is None:
            return self._row[0]
        return channels_first(self._opened()[1], self._layout)

    @property
    def parameters(self) -> Parameters:
        """Of the method."""
        return self._ask.spec.parameters

    @property
    def profile(self) -> Profile:
        """Whose conventions to follow."""
        return self._ask.spec.profile

    @property
    def chunk_rows(self) -> int:
        """Most inputs that may be tried at once."""
        if self._model.static_rows is not None:
            return max(1, self._model.static_rows)
        return max(1, min(self._model.max_rows, self._model.pace.chunk_rows or self._model.max_rows))

    @property
    def tail_chunk_rows(self) -> int:
        """Most activations that may be tried at once: the tail is short, so more than inputs."""
        if self._model.static_rows is not None or self._model.max_rows == 1:
            return self.chunk_rows
        row_bytes = self.activation.numel() * self.activation.element_size()
        most = self._model.pace.tail_rows.get(str(self._tap), MOST_TAIL_ROWS)
        return max(1, min(most, MOST_TAIL_ROWS, _TAIL_BYTES // row_bytes))

    @property
    def score(self) -> float:
        """The target's score for the row as it is."""
        if self._score is None:
            self._score = float(self.scores(self.inputs)[0])
        return self._score

    def generator(self) -> torch.Generator:
        """A new generator on the CPU, seeded by the parameters."""
        return torch.Generator().manual_seed(self.parameters.seed)

    def scores(self, inputs: Float[Tensor, "n channels *input"]) -> Float[Tensor, "n"]:
        """The target's score for other inputs, without grad."""
        return _rows(
            self._in_parts(inputs, lambda part: self._read(self._model.program.run(*self._with_extras(part)), part))
        )

    def tail_scores(self, activations: Float[Tensor, "n c *space"]) -> Float[Tensor, "n"]:
        """The target's score with the layer's activation replaced; only what lies behind the layer is run."""
        return _rows(self._in_parts(activations, self._tail))

    def evidence(self, inputs: Float[Tensor, "n channels *input"]) -> Evidence:
        """What a method of class B would be given at the layer, or at the input, for other inputs."""
        return _joined(self._in_parts(inputs, self._evidence))

    def gradient(self) -> Float[Tensor, "1 c *space"]:
        """The gradient g at the layer for the row as it is."""
        if self._gradient is None:
            self._gradient = _rows(self._in_parts(self.inputs, self._own_gradient))
        return self._gradient

    def _evidence(self, inputs: Tensor) -> Evidence:
        needs = self._ask.method.needs
        graph, refusals = capture_graph(
            self._model, self._with_extras(inputs), [self._tap], differentiable=bool(needs - {Need.LINEAR_HEAD})
        )
        for error in refusals.values():
            raise error
        chosen = [(self._ask.spec.target.output_path, self._aim)] * len(inputs)
        found: dict[BackwardRule | str, Gradients] = {}
        if Need.GRADIENT in needs:
            found[BackwardRule.PLAIN] = graph.gradients(chosen, [self._tap])
        if Need.CURVATURE in needs:
            found["curvature"] = graph.curvatures(chosen, [self._tap])
        for rule in filter(None, map(rule_of, needs)):
            ruled, _ = capture_graph(self._model, self._with_extras(inputs), [INPUT], rule=rule)
            found[rule] = ruled.gradients(chosen, [INPUT])
        weight = class_weight(self._model, self._aim) if Need.LINEAR_HEAD in needs else None
        return evidence_at(
            self._model,
            self._ask,
            self._tap,
            graph.detached_activations(),
            found,
            class_weight=None if weight is None else weight.expand(len(inputs), -1),
        )

    def _own_gradient(self, inputs: Tensor) -> Tensor:
        graph, refusals = capture_graph(self._model, self._with_extras(inputs), [self._tap])
        for error in refusals.values():
            raise error
        chosen = [(self._ask.spec.target.output_path, self._aim)] * len(inputs)
        gradient = differentiable(graph.gradients(chosen, [self._tap]), self._tap)
        return gradient if self._layout is None else channels_first(gradient, self._layout)

    def _opened(self) -> tuple[Cut | None, Tensor, Any]:
        """The cut at the layer, the row's activation there and what crosses; no cut where the program cannot be cut."""
        if self._front is None:
            rows = self._copies(self._model.static_rows or 1)
            try:
                cut = self._model.program.cut(self._tap)
            except Unsupported:
                captured = self._model.program.capture([self._tap], *rows, differentiable=False)
                self._front = (None, captured.activations[self._tap][:1], None)
            else:
                activation, crossing = cut.front(*rows)
                self._front = (cut, activation[:1], crossing)
        return self._front

    def _tail(self, activations: Tensor) -> Tensor:
        cut, own, crossing = self._opened()
        if cut is None:
            # Says why it cannot be cut here.
            cut = self._model.program.cut(self._tap)
        rows = len(activations)
        replaced = activations if self._layout is None else _laid_out(activations, own, self._layout)
        if self._model.static_rows is None:
            try:
                crossing = cut.spread(crossing, rows)
            except Unsupported:
                _, crossing = cut.front(*self._copies(rows))
        with torch.no_grad():
            outputs = cut.tail(replaced, crossing)
        try:
            return self._read(outputs, activations)
        except ExecutionFailed:
            if rows == 1:
                raise
        # Scores that come before the layer, or beside it, stay those of the one row: nothing at the layer moves them.
        return self._read(outputs, activations[:1]).expand(rows)

    def _read(self, outputs: Any, tried: Tensor) -> Tensor:
        """(n) scores of the aim in the outputs of n tries."""
        path = self._ask.spec.target.output_path
        classes = 0 if path else self._model.classes
        readout = read(self._model.kind, outputs, path or self._model.output_path, rows=len(tried), classes=classes)
        with torch.no_grad():
            return readout.scores([self._aim] * len(tried))

    def _copies(self, rows: int) -> tuple[Tensor, ...]:
        return tuple(value.expand(rows, *value.shape[1:]).contiguous() for value in self._row)

    def _with_extras(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs, *self._copies(len(inputs))[1:])

    def _in_parts(self, tried: Tensor, work: Callable[[Tensor], _T]) -> list[tuple[_T, int]]:
        """Runs all rows at once, or padded to the program's own number; in halves when memory runs out.

        Returns:
            What came of each part, and how many rows it had before the padding.
        """
        static = self._model.static_rows
        rows = len(tried)
        try:
            if static is not None and rows < static:
                padded = torch.cat([tried, tried[-1:].expand(static - rows, *tried.shape[1:])])
                return [(work(padded), rows)]
            return [(work(tried), rows)]
        except RuntimeError as error:
            if not is_device_failure(error):
                raise
            if rows == 1 or static is not None:
                raise _no_memory(self._ask) from error
        # Outside the handler: the failed attempt's tensors are held by its traceback.
        middle = rows // 2
        return self._in_parts(tried[:middle], work) + self._in_parts(tried[middle:], work)


def _rows(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    return torch.cat([values[:rows] for values, rows in parts])


def _joined(parts: Sequence[tuple[Evidence, int]]) -> Evidence:
    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        found = [(value, rows) for value, (_, rows) in zip(values, parts, strict=True) if value is not None]
        return _rows(found) if found else None

    return dataclasses.replace(
        parts[0][0],
        activation=_rows([(evidence.activation, rows) for evidence, rows in parts]),
        class_weight=joined([evidence.class_weight for evidence, _ in parts]),
        gradient=joined([evidence.gradient for evidence, _ in parts]),
        curvature=joined([evidence.curvature for evidence, _ in parts]),
        input_gradient=joined([evidence.input_gradient for evidence, _ in parts]),
    )


def _laid_out(values: Tensor, own: Tensor, layout: Layout) -> Tensor:
    """(n c *space) back to how the model lays the layer out; prefix tokens are the row's own."""
    match layout.kind:
        case LayoutKind.CHANNELS_FIRST:
            return values
        case LayoutKind.CHANNELS_LAST:
            return values.movedim(1, -1).contiguous()
        case LayoutKind.TOKENS:
            tokens = values.flatten(2).movedim(1, -1)
            prefix = own[:, : layout.prefix].expand(len(values), layout.prefix, own.shape[2])
            return torch.cat([prefix, tokens], dim=1)


def _no_memory(ask: Ask) -> CamserveError:
    return ExecutionFailed(
        Reason.OUT_OF_MEMORY,
        f"the device ran out of memory for one try of {ask.method.slug}; use a smaller input or a deeper layer",
        metadata={"method": ask.method.slug},
    )

"""What the engine asks of a model, whatever file it came from.

A `Program` is a loaded model that can be run, tapped and cut. `script.py`, `export.py` and `eager.py` hold the three kinds;
`passes.py` runs them and `probe.py` looks at them once after loading. Nothing here or behind it knows of requests.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from camserve.server.errors import NotFound, Reason

__all__ = [
    "ATTENTION",
    "INPUT",
    "BackwardRule",
    "Call",
    "Capture",
    "Cut",
    "Digests",
    "Program",
    "ProgramKind",
    "TapName",
]


class ProgramKind(enum.StrEnum):
    """Where a program came from; refusals name it because what can be tapped depends on it."""

    TORCHSCRIPT = "torchscript"
    EXPORT = "export"
    EAGER = "eager"


class BackwardRule(enum.StrEnum):
    """How a capture differentiates. The forward's values are the same under the first three."""

    PLAIN = "plain"
    """As the model says."""
    GUIDED = "guided"
    """Guided backpropagation (arXiv:1412.6806): a ReLU passes a gradient on where it and the ReLU's input are positive."""
    DECONVNET = "deconvnet"
    """Deconvnet (arXiv:1311.2901): each ReLU passes a gradient on only where the gradient is positive, whatever its input."""
    ATTENTION = "attention"
    """Fused attention is computed step by step, so that its probabilities can be tapped; last bits of the forward may move."""


@dataclasses.dataclass(frozen=True, slots=True)
class TapName:
    """A place in the model: one call of one module, and for modules that return several tensors, one of them.

    Written `layer4.1.relu` (the module's last call), `layer4.1.relu#0` (its first), `backbone.fpn:0` or `backbone:out` (one
    output of a module that returns a tuple or a dict), `neck#1:0` (both).
    """

    path: str
    call: int | None = None
    output: str | None = None

    _PATTERN = re.compile(r"(?P<path>[^#:]+)(#(?P<call>\d+))?(:(?P<output>[^#:]+))?")

    @classmethod
    def parse(cls, text: str) -> TapName:
        """Reads the written form.

        Raises:
            NotFound: the text has none of the forms above.
        """
        match = cls._PATTERN.fullmatch(text)
        if match is None:
            raise NotFound(
                Reason.LAYER_NOT_FOUND,
                f"layer {text!r} is not a layer name; write 'layer4', 'layer4.1.relu#0' for one call, 'fpn:0' for one output",
                metadata={"layer": text},
            )
        call = match["call"]
        return cls(match["path"], None if call is None else int(call), match["output"])

    def __str__(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        output = "" if self.output is None else f":{self.output}"
        return f"{self.path}{call}{output}"


INPUT = TapName("@input")
"""Stands for the model's own input among taps; the pass resolves it, programs never see it."""

ATTENTION = TapName("@attention")
"""Under `BackwardRule.ATTENTION`, taps every attention's probabilities, (b heads queries keys); they come as `@attention#0` …"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one module during a forward, in order of execution.

    Attributes:
        path: dotted module path, as in `named_modules()`.
        index: 0 for the module's first call.
        outputs: keys of the tensors it returns, in order, when it returns a tuple or a dict; empty for a single tensor.
        refusal: why it cannot be tapped; empty when it can.
    """

    path: str
    index: int
    outputs: tuple[str, ...] = ()
    refusal: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """What one tapped forward leaves.

    Attributes:
        outputs: what the model returned, differentiable with respect to every activation unless that was not wanted.
        activations: the value at each tap, as the module returned it, shape (b, ...); every one requires grad, or none. The
            earliest on a path is a leaf, so nothing before it has a graph.
    """

    outputs: Any
    activations: Mapping[TapName, Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """SHA-256 in lower-case hex.

    Attributes:
        weights: over every parameter and buffer: name, dtype, shape and bytes, in order of name.
        code: over the program's code or graph.
    """

    weights: str
    code: str


class Cut(Protocol):
    """A program cut in two at one tap; running front then tail equals running the program bit for bit."""

    def front(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """Runs up to the tap without grad; returns the activation and whatever else crosses the cut, for `tail`."""
        ...

    def tail(self, activation: Tensor, crossing: Any) -> Any:
        """Runs the rest on `activation` (its batch size must be the crossing's); neither argument is changed."""
        ...

    def spread(self, crossing: Any, rows: int) -> Any:
        """What crosses the cut for `rows` copies of the one row that `front` was given, without running it again.

        Raises:
            Unsupported: it cannot be told which of the crossing values belong to the row; the message says what to do.
        """
        ...


class Program(Protocol):
    """A loaded model. Its parameters are frozen, it is in eval mode and is never changed by what is done here.

    `run`, `capture` and `cut` are called from one thread at a time: the device thread owns the program.
    """

    @property
    def kind(self) -> ProgramKind:
        """The file's kind."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype the program computes in."""
        ...

    def calls(self) -> Sequence[Call]:
        """Every module call of a forward, in order, with what it returns. Cheap after the first time."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name. Names may be missing from an archive that was frozen before it was saved."""
        ...

    @property
    def hooks(self) -> int:
        """How many hooks are on its modules right now: none between two passes. Any thread may ask."""
        ...

    def digests(self) -> Digests:
        """What the program is, for the model card and the audit record."""
        ...

    def run(self, *inputs: Tensor) -> Any:
        """One forward without grad; returns what the model returns."""
        ...

    def biases(self) -> Mapping[TapName, Tensor]:
        """What each affine layer adds to its output, (c), in order of execution; FullGrad's bias gradients start there.

        A convolution or a linear layer adds its bias, a batch normalisation in eval mode `bias - running_mean * weight /
        sqrt(running_var + eps)`. Layers that add nothing are left out; a layer called several times is listed once a call.

        Raises:
            Unsupported: a layer's constant cannot be told, so that a sum over those listed would not be complete.
        """
        ...

    def capture(
        self,
        taps: Sequence[TapName],
        *inputs: Tensor,
        differentiable: bool = True,
        rule: BackwardRule = BackwardRule.PLAIN,
    ) -> Capture:
        """One forward that keeps the value at each tap; `taps` may be empty.

        Without `differentiable` no graph is built, which saves its memory; all values have the same bits. An input that requires
        grad keeps its graph: outputs and activations can then be differentiated with respect to it, and taps are no leaves.

        Raises:
            NotFound: a tap's module does not exist; the message lists near and tappable names.
            Unsupported: it exists but cannot be tapped in this kind of program, or returns several tensors and the tap names
                none of them; the message says which names would do. Or the rule cannot be applied to this program: the message
                names the operators or modules in the way, and what would work.
        """
        ...

    def cut(self, tap: TapName) -> Cut:
        """Cuts the program at one tap. Raises as `capture` does."""
        ...

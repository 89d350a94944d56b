"""One capture of every layer, with the gradient of the model's scores at each.

`probe.py` asks. All taps ride one forward and one gradient; where a program cannot do that, each gets its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from camserve.server.engine.program import Program, TapName
from camserve.server.engine.readouts import select_detections, select_output
from camserve.server.errors import CamserveError, ExecutionFailed
from camserve.server.jobs import OutputKind

__all__ = ["FAILURES", "Seen", "find_scores", "look", "message_of"]

# What a program raises for an input it does not take or a graph it cannot differentiate. Guards of exports raise AssertionError,
# assertions of TorchScript its own Error, which is no RuntimeError, Python code whatever it likes of the others; running out of
# memory is a RuntimeError too.
FAILURES = (
    CamserveError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AssertionError,
    torch.jit.Error,
)
# How TorchScript begins; two stack traces follow, and what happened stands in the last line.
_INTERPRETER = "The following operation failed in the TorchScript interpreter"

_RETRACE = (
    "it was traced through PyTorch's fused attention, which has no derivative; trace it again after "
    "torch.backends.mha.set_fastpath_enabled(False), or export it with torch.export"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was seen at some taps, everything detached.

    Attributes:
        values: activations (b, ...), in the order of the taps.
        gradients: of the scores; None where they do not depend on the tap. Empty if there is no derivative, or no score.
        no_gradient: why there is no derivative, and what to do about it.
        scores: what is differentiated: class scores (b, classes), another kind's tensor, or the scores of all detections (n).
        refusals: taps that could not be captured, and why.
    """

    values: Mapping[TapName, Tensor]
    gradients: Mapping[TapName, Tensor | None]
    no_gradient: str
    scores: Tensor
    refusals: Mapping[TapName, str]


def look(
    program: Program,
    taps: Sequence[TapName],
    inputs: Sequence[Tensor],
    output_path: str,
    kind: OutputKind = OutputKind.CLASSIFICATION,
) -> Seen:
    """Captures every tap and differentiates.

    Args:
        program: looked at.
        taps: with call indices; may be empty.
        inputs: (b, c, *space), and further ones if the model takes several.
        output_path: see `readouts.select_output`.
        kind: of the output.
    """
    try:
        return _look_once(program, taps, inputs, output_path, kind)
    except FAILURES:
        if not taps:
            raise
    found = _look_once(program, (), inputs, output_path, kind)
    values: dict[TapName, Tensor] = {}
    gradients: dict[TapName, Tensor | None] = {}
    refusals: dict[TapName, str] = {}
    reasons: list[str] = []
    for tap in taps:
        try:
            one = _look_once(program, [tap], inputs, output_path, kind)
        except FAILURES as error:
            refusals[tap] = message_of(error)
            continue
        values |= one.values
        gradients |= one.gradients
        reasons.append(one.no_gradient)
    no_gradient = "" if "" in reasons or not reasons else reasons[-1]
    return dataclasses.replace(found, values=values, gradients=gradients, no_gradient=no_gradient, refusals=refusals)


def _look_once(
    program: Program, taps: Sequence[TapName], inputs: Sequence[Tensor], output_path: str, kind: OutputKind
) -> Seen:
    capture = program.capture(taps, *inputs)
    scores = find_scores(capture.outputs, output_path, kind)
    gradients: dict[TapName, Tensor | None] = {}
    no_gradient = ""
    if taps and scores.numel():
        try:
            found = torch.autograd.grad(_mixture(scores), list(capture.activations.values()), allow_unused=True)
            gradients = dict(zip(capture.activations, found, strict=True))
        except RuntimeError as error:
            no_gradient = _explain(error)
    return Seen(
        values={tap: value.detach() for tap, value in capture.activations.items()},
        gradients=gradients,
        no_gradient=no_gradient,
        scores=scores.detach(),
        refusals={},
    )


def find_scores(outputs: Any, output_path: str, kind: OutputKind) -> Tensor:
    """What the model's answer is made of: see `Seen.scores`.

    Where a card calls nothing else by name, the first floating tensor stands in for class scores that are not there: the layers
    of any model can be looked at.
    """
    if kind is OutputKind.DETECTION:
        return torch.cat([answer["scores"] for answer in select_detections(outputs, output_path)])
    try:
        return select_output(kind, outputs, output_path)
    except ExecutionFailed:
        floating = [
            leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if kind is not OutputKind.CLASSIFICATION or output_path or not floating:
            raise
        return floating[0]


def _mixture(scores: Tensor) -> Tensor:
    """Sums the scores with unlike weights: the plain sum of probabilities is constant and has no gradient."""
    rows = scores.flatten(1) if scores.ndim > 1 else scores[None]
    places = torch.arange(rows.shape[1], device=scores.device, dtype=scores.dtype)
    return (rows * torch.cos(places)).sum()


def _explain(error: RuntimeError) -> str:
    text = message_of(error)
    if "derivative for aten::_native_multi_head_attention" in text or "_transformer_encoder_layer_fwd" in text:
        return _RETRACE
    if "does not require grad" in text:
        return "its output does not depend on any layer differentiably: it computes without gradients or returns whole numbers"
    return f"it cannot be differentiated: {text}"


def message_of(error: BaseException) -> str:
    """The line of an error that says what happened: the first, since PyTorch's go on with stack traces; TorchScript's last."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if lines[0].startswith(_INTERPRETER) else 0]

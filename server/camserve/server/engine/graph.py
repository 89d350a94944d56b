"""One captured forward: its outputs, read by path, and gradients of chosen scores with respect to what was tapped.

`passes.py` makes one for the whole batch under the plain rule, and further ones under other rules when a spec needs them;
`scene.py` makes small ones for amplified methods. The graph lives until `release`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from camserve.server.engine.plan import PassModel
from camserve.server.engine.program import INPUT, BackwardRule, Capture, TapName
from camserve.server.engine.readouts import Aim, Readout, read
from camserve.server.errors import CamserveError, ExecutionFailed, InvalidRequest, Reason, Unsupported

__all__ = ["Chosen", "Gradients", "PassGraph", "capture_graph", "is_device_failure", "moved"]

Chosen: TypeAlias = tuple[str, Aim]
"""An aim, and the output path of its target; empty for the card's."""

Gradients: TypeAlias = Mapping[TapName, Tensor | CamserveError | None]


def is_device_failure(error: RuntimeError) -> bool:
    """Tells running out of memory, and a broken device, from what concerns one map alone; the runner deals with those."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return "DefaultCPUAllocator" in str(error)


class PassGraph:
    """What a tapped forward left: outputs that can be differentiated with respect to each activation, any number of times.

    Attributes:
        device: where it was made.
        activations: by tap; attached to the graph until `release`.
    """

    def __init__(self, model: PassModel, outputs: Any, activations: Mapping[TapName, Tensor], rows: int) -> None:
        self.device = model.program.device
        self._model = model
        self._outputs = outputs
        self._rows = rows
        self._readouts: dict[str, Readout] = {}
        self.activations = activations

    def readout(self, path: str = "") -> Readout:
        """The outputs at a path; empty takes the card's.

        Raises:
            ExecutionFailed: there is nothing of the model's kind at the card's path.
            InvalidRequest: there is none at another path, which the request named.
        """
        if path not in self._readouts:
            if self._outputs is None:
                raise ValueError("the outputs of a released graph are gone")
            where = path or self._model.output_path
            # Another path may hold another number of classes.
            classes = 0 if path else self._model.classes
            try:
                self._readouts[path] = read(self._model.kind, self._outputs, where, rows=self._rows, classes=classes)
            except ExecutionFailed as error:
                if not path:
                    raise
                raise _wrong_path(path, error) from error
        return self._readouts[path]

    def release(self) -> None:
        """Frees the graph. Nothing can be differentiated afterwards; detached activations stay with whoever has them."""
        for readout in self._readouts.values():
            readout.detach()
        self._outputs = None
        self.activations = {}

    def detached_activations(self) -> dict[TapName, Tensor]:
        """The activations without their graph."""
        return {tap: value.detach() for tap, value in self.activations.items()}

    def gradients(self, chosen: Sequence[Chosen | None], taps: Sequence[TapName]) -> Gradients:
        """Differentiates the sum of every row's chosen score; one backward pass, unless an operator has no derivative.

        Returns:
            For each tap the gradient, None where the score does not depend on it, or why it cannot be differentiated.
        """
        if not self._requires_grad(chosen):
            return dict.fromkeys(taps)
        activations = [self.activations[tap] for tap in taps]
        try:
            found = torch.autograd.grad(self._total(chosen), activations, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if is_device_failure(error):
                raise
            if len(taps) == 1:
                return {taps[0]: _no_derivative(taps[0], error)}
        else:
            return dict(zip(taps, found, strict=True))
        # One layer before an operator without a derivative must not take down those behind it.
        return {tap: gradient for alone in taps for tap, gradient in self.gradients(chosen, [alone]).items()}

    def curvatures(self, chosen: Sequence[Chosen | None], taps: Sequence[TapName]) -> Gradients:
        """H A at each tap: the Hessian of the chosen scores with respect to A, times A; a gradient of a gradient.

        Zero where the gradient does not depend on the activation, as behind layers that are piecewise linear.
        """
        found: dict[TapName, Tensor | CamserveError | None] = {}
        for tap in taps:
            activation = self.activations[tap]
            found[tap] = None
            if not self._requires_grad(chosen):
                continue
            try:
                total = self._total(chosen)
                (gradient,) = torch.autograd.grad(total, [activation], create_graph=True, allow_unused=True)
                if gradient is None:
                    continue
                found[tap] = torch.zeros_like(activation)
                if gradient.requires_grad:
                    # Retained: further gradients, also other callers', go through the same forward.
                    (product,) = torch.autograd.grad(
                        gradient, [activation], grad_outputs=activation.detach(), retain_graph=True, allow_unused=True
                    )
                    found[tap] = found[tap] if product is None else product
            except RuntimeError as error:
                if is_device_failure(error):
                    raise
                found[tap] = _no_second_derivative(tap, error)
        return found

    def _requires_grad(self, chosen: Sequence[Chosen | None]) -> bool:
        return any(self.readout(path).requires_grad for path in _paths(chosen))

    def _total(self, chosen: Sequence[Chosen | None]) -> Tensor:
        """The sum of all chosen scores: rows do not influence each other, so each gets its own gradient from it."""
        with torch.enable_grad():
            sums = [
                self.readout(path).scores([one[1] if one and one[0] == path else None for one in chosen]).sum()
                for path in _paths(chosen)
            ]
            return torch.stack(sums).sum()


def capture_graph(
    model: PassModel,
    inputs: Sequence[Tensor],
    taps: Sequence[TapName],
    *,
    rule: BackwardRule = BackwardRule.PLAIN,
    differentiable: bool = True,
) -> tuple[PassGraph, dict[TapName, CamserveError]]:
    """Runs the model once, tapped.

    Args:
        model: what runs.
        inputs: on its device, in its dtype; rows first.
        taps: what to keep; `INPUT` and `ATTENTION` among them.
        rule: how gradients go back.
        differentiable: whether anything will be differentiated.

    Returns:
        The graph, and the taps that were refused beside what could be had.

    Raises:
        Unsupported: the rule cannot be applied to this program.
    """
    kept = dict.fromkeys(taps)
    inputs = list(inputs)
    activations: dict[TapName, Tensor] = {}
    if INPUT in kept:
        del kept[INPUT]
        if differentiable and inputs[0].is_floating_point():
            inputs[0] = inputs[0].detach().requires_grad_()
        activations[INPUT] = inputs[0]
    captured, refusals = _capture(model, list(kept), inputs, rule, differentiable=differentiable)
    activations.update(captured.activations)
    return PassGraph(model, captured.outputs, activations, len(inputs[0])), refusals


def moved(model: PassModel, value: Tensor) -> Tensor:
    """An input on the model's device; floating ones in its dtype."""
    program = model.program
    return value.to(program.device, program.dtype if value.is_floating_point() else value.dtype)


def _capture(
    model: PassModel, taps: Sequence[TapName], inputs: Sequence[Tensor], rule: BackwardRule, *, differentiable: bool
) -> tuple[Capture, dict[TapName, CamserveError]]:
    """Captures all taps or, if the program refuses, those that it takes one at a time.

    A refusal names one tap, and there may be more. Validation lets few through, so the extra forwards hardly ever run.
    """
    program = model.program
    if not taps and not inputs[0].requires_grad:
        return Capture(outputs=program.run(*inputs), activations={}), {}
    try:
        return program.capture(taps, *inputs, differentiable=differentiable, rule=rule), {}
    except CamserveError as error:
        if not taps or rule is not BackwardRule.PLAIN:
            raise
        refusals = {taps[0]: error}
    if len(taps) > 1:
        refusals = {}
        for tap in taps:
            try:
                program.capture([tap], *inputs, differentiable=False)
            except CamserveError as error:
                refusals[tap] = error
    accepted = [tap for tap in taps if tap not in refusals]
    if len(accepted) == len(taps):
        raise ExecutionFailed(Reason.MODEL_FAILED, "the model takes each of the layers alone but not together")
    captured, _ = _capture(model, accepted, inputs, rule, differentiable=differentiable)
    return captured, refusals


def _paths(chosen: Sequence[Chosen | None]) -> list[str]:
    return list(dict.fromkeys(one[0] for one in chosen if one))


def _wrong_path(path: str, error: ExecutionFailed) -> CamserveError:
    return InvalidRequest(
        Reason.FIELD_INVALID,
        f"target.output_path {path!r} cannot be explained: {error.message.partition(';')[0]}; "
        f"paths: {error.metadata.get('paths')}; name one that holds scores, or leave it out",
        metadata={**error.metadata, "outputPath": path},
    )


def _no_derivative(tap: TapName, error: RuntimeError) -> CamserveError:
    where = "the input" if tap == INPUT else f"layer '{tap}'"
    return Unsupported(
        Reason.TARGET_NOT_DIFFERENTIABLE,
        f"an operator between {where} and the target has no derivative; choose a later layer ({error})",
        metadata={"layer": tap},
    )


def _no_second_derivative(tap: TapName, error: RuntimeError) -> CamserveError:
    return Unsupported(
        Reason.TARGET_NOT_DIFFERENTIABLE,
        f"an operator between layer '{tap}' and the target has no second derivative; use grad-cam, which needs only the first "
        f"({error})",
        metadata={"layer": tap, "instead": "grad-cam"},
    )

"""Cuts a program without a graph: the front stops at the tap, the tail runs the model again with the tap's value replaced.

Running again is the only exact way to resume Python code in its middle. To keep the tail cheap the front remembers what the
modules before the tap returned, and the tail hands those values out instead of calling them, so that only the code between
modules runs twice. `HookedProgram.cut` is the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from camserve.server.engine.hooked_replay import Front, Reached, Tail
from camserve.server.engine.hooked_rows import Copies, are_near, copies_of, doubled, shapes_of, unclear
from camserve.server.engine.hooked_tail import Before, MoreRows, Unclear
from camserve.server.engine.hooks import Modules, forward_replaced, plain_attention
from camserve.server.engine.program import ProgramKind, TapName
from camserve.server.errors import CamserveError, Reason, Unsupported

__all__ = ["RerunCut"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Crossing:
    """What crosses a cut.

    Attributes:
        inputs: the model's own.
        remembered: by call name what the outermost modules before the tap returned, and the calls made inside them.
        rows: for how many copies of the row it is to serve; 0 for as many as there are.
        copies: what becomes of the tensors before the tap, if the tail is to stay on one row up to there.
        is_writing: whether such a tail writes to the activation.
    """

    inputs: tuple[Tensor, ...]
    remembered: Mapping[str, tuple[Any, Mapping[str, int]]]
    rows: int = 0
    copies: Mapping[int, Copies] | None = None
    is_writing: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """How crossings of one shape are spread.

    Attributes:
        light: what becomes of the few tensors that are used after the tap; None if that is not the whole story.
        heavy: what becomes of everything that is remembered, leaf by leaf; None as long as it is not needed.
        is_writing: whether the rest of the model writes to the activation.
    """

    light: Mapping[int, Copies] | None
    heavy: tuple[Copies, ...] | None
    is_writing: bool = True


class RerunCut:
    """A `Cut` of an `nn.Module` at one place.

    The crossing holds the model's inputs and what the outermost modules before the tap returned, about as much memory as the
    activations of those modules. A module is called again rather than remembered if it changed its input or returned memory of it
    (in-place activations, identities, views): skipping it would lose the effect, and it is cheap. Modules must hand values to
    each other by arguments and results; one that leaves a value in an attribute for another is not seen.

    A tail on a spread crossing stays on one row up to the tap; what is used afterwards is made for all rows when it is used. That
    this gives what running everything on all rows gives is tried out once per input shape, on two copies of a row; where it does
    not, as in a model that keeps its batch size in a variable, everything that is remembered is spread.

    Args:
        kind: named by refusals.
        module: the whole model, frozen and in eval mode.
        modules: its submodules by path.
        place: the tap, with its call index.
        owned: addresses of the memory of parameters and buffers.
    """

    def __init__(
        self, kind: ProgramKind, module: nn.Module, modules: Modules, place: TapName, *, owned: Collection[int]
    ) -> None:
        self._kind = kind
        self._module = module
        self._modules = modules
        self._place = place
        self._owned = owned
        # A caller's own forward hook would run again on what it returned already.
        self._hooked = frozenset(path for path, module in modules if module._forward_hooks)  # noqa: SLF001
        self._verdicts: dict[Any, _Verdict] = {}

    def front(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """Runs up to the tap without grad.

        Returns:
            The activation at the tap, shape (b, ...), and the crossing for `tail`.

        Raises:
            Unsupported: this input does not lead to the tap.
        """
        front = Front(self._place, self._hooked)
        with torch.no_grad(), plain_attention(), contextlib.ExitStack() as hooks:
            for path, module in self._modules:
                start = module.register_forward_pre_hook(front.starter(), with_kwargs=True)
                hooks.callback(start.remove)
                hooks.callback(module.register_forward_hook(front.finisher(path)).remove)
            with contextlib.suppress(Reached):
                self._module(*(tensor.clone() for tensor in inputs))
        if front.activation is None:
            raise _never_reached(self._place)
        kept = tuple(tensor.detach().clone() for tensor in inputs)
        return front.activation, _Crossing(inputs=kept, remembered=dict(front.remembered))

    def tail(self, activation: Tensor, crossing: Any) -> Any:
        """Runs the rest on `activation`, with a graph if it requires grad and gradients are enabled.

        Raises:
            Unsupported: the crossing does not lead to the tap.
        """
        if crossing.copies is None:
            return self._tail(activation, crossing, None)
        more = MoreRows(crossing.rows, dict(crossing.copies), is_copying=crossing.is_writing)
        try:
            return self._tail(activation, crossing, more)
        except Unclear as error:
            raise self._unclear(str(error)) from error

    def spread(self, crossing: Any, rows: int) -> Any:
        """What crosses for `rows` copies of the one row that `front` was given.

        The first call for an input shape runs a front and two tails on two rows, to find out what belongs to the row.

        Raises:
            Unsupported: it cannot be told.
            ValueError: the crossing is not that of one row.
        """
        key = shapes_of(crossing.inputs)
        if key not in self._verdicts:
            self._verdicts[key] = self._verdict(crossing, doubled(crossing.inputs))
        verdict = self._verdicts[key]
        if verdict.light is not None:
            return dataclasses.replace(crossing, rows=rows, copies=verdict.light, is_writing=verdict.is_writing)
        leaves, spec = _outputs_of(crossing)
        many = [copies.make(leaf, rows) for copies, leaf in zip(verdict.heavy or (), leaves, strict=True)]
        outputs = pytree.tree_unflatten(many, spec)
        inside = {name: calls for name, (_, calls) in crossing.remembered.items()}
        return _Crossing(
            inputs=tuple(tensor.expand(rows, *tensor.shape[1:]) for tensor in crossing.inputs),
            remembered={name: (outputs[name], calls) for name, calls in inside.items()},
        )

    def _verdict(self, one: _Crossing, two_inputs: Sequence[Tensor]) -> _Verdict:
        activation, two = self.front(*two_inputs)
        unlike = activation.clone()
        unlike[len(unlike) // 2 :] *= 0.5  # Copies would not show it if rows were mixed up.
        light: dict[int, Copies] = {}
        with torch.no_grad():
            before = Before()
            expected = self._tail(unlike, two, before)
            more = MoreRows(2, light, before.values)
            try:
                found = self._tail(unlike, one, more)
            except (Unclear, CamserveError, RuntimeError, TypeError, ValueError, IndexError, AssertionError):
                found = None  # Most models never come here; those that do are resumed the long way.
        if found is not None and are_near(expected, found):
            return _Verdict(light=light, heavy=None, is_writing=more.has_written())
        leaves, spec = _outputs_of(one)
        others, other_spec = _outputs_of(two)
        if spec != other_spec:
            raise self._unclear("two copies of the row take another way through the model than one")
        heavy = [copies_of(leaf, other) for leaf, other in zip(leaves, others, strict=True)]
        for leaf, copies in zip(leaves, heavy, strict=True):
            if copies is None:
                shape = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
                raise self._unclear(
                    f"it cannot be told what part of {shape}, made before the layer, belongs to the row"
                )
        return _Verdict(light=None, heavy=tuple(copies for copies in heavy if copies is not None))

    def _unclear(self, problem: str) -> Unsupported:
        return unclear(
            self._kind, self._place, problem, "choose a later layer, or a method that does not resume the model"
        )

    def _tail(self, activation: Tensor, crossing: _Crossing, mode: Before | None) -> Any:
        tail = Tail(self._place, activation, crossing.remembered, self._owned, mode)
        replayed = {name.partition("#")[0] for name in crossing.remembered}
        with_grad = torch.is_grad_enabled() and activation.requires_grad
        with torch.set_grad_enabled(with_grad), plain_attention(), contextlib.ExitStack() as changes:
            for path, module in self._modules:
                if path in replayed:
                    changes.enter_context(forward_replaced(module, tail.replay(path, module.forward)))
                if path in replayed or path == self._place.path:
                    changes.callback(module.register_forward_hook(tail.finisher(path), with_kwargs=True).remove)
            changes.enter_context(mode or contextlib.nullcontext())
            outputs = self._module(*(tensor.clone() for tensor in crossing.inputs))
            if isinstance(mode, MoreRows):
                outputs = mode.of_all_rows(outputs)
        if not tail.is_replaced:
            raise _never_reached(self._place)
        return outputs


def _outputs_of(crossing: _Crossing) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten({name: output for name, (output, _) in crossing.remembered.items()})


def _never_reached(place: TapName) -> Unsupported:
    return Unsupported(
        Reason.LAYER_UNUSABLE, f"layer '{place}' is not reached with this input", metadata={"layer": place}
    )

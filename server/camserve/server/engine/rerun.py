"""Cuts a program without a graph: the front stops at the tap, the tail runs the model again with the tap's value replaced.

Running again is the only exact way to resume Python code in its middle. To keep the tail cheap the front remembers what the
modules before the tap returned, and the tail hands those values out instead of calling them, so that only the code between
modules runs twice. `HookedProgram.cut` is the caller.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from camserve.server.engine.hooks import Modules, forward_replaced, handed_on, pick, plain_attention, put, tensors_of
from camserve.server.engine.program import TapName
from camserve.server.errors import Reason, Unsupported

__all__ = ["RerunCut"]


class _Reached(BaseException):
    """Ends the front at the tap. Not an `Exception`, so that no model's `except Exception` swallows it."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Start:
    """A module call that has begun: what to compare with when it ends."""

    inputs: list[Tensor]
    versions: list[int]
    remembered: int
    counts: collections.Counter[str]


class RerunCut:
    """A `Cut` of an `nn.Module` at one place.

    The crossing is `(inputs, remembered)`: the model's inputs, and by call name what the outermost modules before the tap
    returned together with the calls made inside them. Its tensors hold about as much memory as the activations of those
    modules. A module is called again rather than remembered if it changed its input or returned memory of it (in-place
    activations, identities, views): skipping it would lose the effect, and it is cheap. Modules must hand values to each other
    by arguments and results; one that leaves a value in an attribute for another is not seen.

    Args:
        module: the whole model, frozen and in eval mode.
        modules: its submodules by path.
        place: the tap, with its call index.
        owned: addresses of the memory of parameters and buffers.
    """

    def __init__(self, module: nn.Module, modules: Modules, place: TapName, *, owned: Collection[int]) -> None:
        self._module = module
        self._modules = modules
        self._place = place
        self._owned = owned
        # A caller's own forward hook would run again on what it returned already.
        self._hooked = frozenset(path for path, module in modules if module._forward_hooks)  # noqa: SLF001

    def front(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """Runs up to the tap without grad.

        Returns:
            The activation at the tap, shape (b, ...), and the crossing for `tail`.

        Raises:
            Unsupported: this input does not lead to the tap.
        """
        front = _Front(self._place, self._hooked)
        with torch.no_grad(), plain_attention(), contextlib.ExitStack() as hooks:
            for path, module in self._modules:
                start = module.register_forward_pre_hook(front.starter(), with_kwargs=True)
                hooks.callback(start.remove)
                hooks.callback(module.register_forward_hook(front.finisher(path)).remove)
            with contextlib.suppress(_Reached):
                self._module(*(tensor.clone() for tensor in inputs))
        if front.activation is None:
            raise _never_reached(self._place)
        return front.activation, (tuple(tensor.detach().clone() for tensor in inputs), dict(front.remembered))

    def tail(self, activation: Tensor, crossing: Any) -> Any:
        """Runs the rest on `activation`, with a graph if it requires grad and gradients are enabled.

        Raises:
            Unsupported: the crossing does not lead to the tap.
        """
        inputs, remembered = crossing
        tail = _Tail(self._place, activation, remembered, self._owned)
        replayed = {name.partition("#")[0] for name in remembered}
        with_grad = torch.is_grad_enabled() and activation.requires_grad
        with torch.set_grad_enabled(with_grad), plain_attention(), contextlib.ExitStack() as changes:
            for path, module in self._modules:
                if path in replayed:
                    changes.enter_context(forward_replaced(module, tail.replay(path, module.forward)))
                if path in replayed or path == self._place.path:
                    changes.callback(module.register_forward_hook(tail.finisher(path), with_kwargs=True).remove)
            outputs = self._module(*(tensor.clone() for tensor in inputs))
        if not tail.is_replaced:
            raise _never_reached(self._place)
        return outputs


class _Front:
    """Watches a forward up to the place and remembers what finished before it."""

    def __init__(self, place: TapName, hooked: frozenset[str]) -> None:
        self.activation: Tensor | None = None
        self._hooked = hooked
        self.remembered: list[tuple[str, tuple[Any, dict[str, int]]]] = []
        self._place = place
        self._open: list[_Start] = []
        self._counts: collections.Counter[str] = collections.Counter()

    def starter(self) -> Callable[..., None]:
        def start(_module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = tensors_of((args, kwargs))
            versions = [tensor._version for tensor in inputs]  # noqa: SLF001 - PyTorch offers no public name for it.
            self._open.append(_Start(inputs, versions, len(self.remembered), self._counts.copy()))

        return start

    def finisher(self, path: str) -> Callable[..., None]:
        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            begun = self._open.pop()
            index = self._counts[path]
            self._counts[path] += 1
            if (path, index) == (self._place.path, self._place.call):
                self.activation = pick(output, self._place.output).clone()
                raise _Reached
            if path not in self._hooked and _is_skippable(begun, output):
                inside = self._counts - begun.counts - collections.Counter([path])
                del self.remembered[begun.remembered :]
                self.remembered.append((f"{path}#{index}", (_copied(output), dict(inside))))

        return finish


def _is_skippable(begun: _Start, output: Any) -> bool:
    """Whether a call did nothing but return new tensors."""
    results = tensors_of(output)
    is_changed = any(
        tensor._version != version  # noqa: SLF001
        for tensor, version in zip(begun.inputs, begun.versions, strict=True)
    )
    memory = {tensor.untyped_storage().data_ptr() for tensor in begun.inputs}
    is_shared = any(tensor.untyped_storage().data_ptr() in memory for tensor in results)
    return bool(results) and not is_changed and not is_shared


class _Tail:
    """Replays what the front remembered and puts the caller's activation in its place."""

    def __init__(
        self,
        place: TapName,
        activation: Tensor,
        remembered: Mapping[str, tuple[Any, Mapping[str, int]]],
        owned: Collection[int],
    ) -> None:
        self._owned = owned
        self.is_replaced = False
        self._place = place
        self._activation = activation
        self._remembered = remembered
        self._counts: collections.Counter[str] = collections.Counter()

    def replay(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replay(*args: Any, **kwargs: Any) -> Any:
            name = f"{path}#{self._counts[path]}"
            if name not in self._remembered:
                return forward(*args, **kwargs)
            output, inside = self._remembered[name]
            self._counts.update(inside)
            return _copied(output)

        return replay

    def finisher(self, path: str) -> Callable[..., Any]:
        def finish(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            index = self._counts[path]
            self._counts[path] += 1
            if (path, index) != (self._place.path, self._place.call):
                return output
            self.is_replaced = True
            value = pick(output, self._place.output)
            onward = handed_on(self._activation, value, (args, kwargs), self._owned)
            return put(output, self._place.output, onward)

        return finish


def _copied(output: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, output)


def _never_reached(place: TapName) -> Unsupported:
    return Unsupported(
        Reason.LAYER_UNUSABLE, f"layer '{place}' is not reached with this input", metadata={"layer": place}
    )

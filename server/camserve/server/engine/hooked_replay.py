"""What watches the two runs of a cut: one remembers what modules return before the tap, the other hands it out again.

Arrives: the module calls of a forward, through hooks and replaced forwards that `rerun.py` puts there. Leaves: the activation and
what was remembered, or the caller's activation in the tapped value's place.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from camserve.server.engine.hooked_tail import Before, MoreRows
from camserve.server.engine.hooks import handed_on, pick, put, tensors_of
from camserve.server.engine.program import TapName

__all__ = ["Front", "Reached", "Tail"]


class Reached(BaseException):
    """Ends the front at the tap. Not an `Exception`, so that no model's `except Exception` swallows it."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Start:
    """A module call that has begun: what to compare with when it ends."""

    inputs: list[Tensor]
    versions: list[int]
    remembered: int
    counts: collections.Counter[str]


class Front:
    """Watches a forward up to the place and remembers what finished before it.

    Attributes:
        activation: at the place, once it is reached.
        remembered: by call name what a module returned, and the calls made inside it.
    """

    def __init__(self, place: TapName, hooked: frozenset[str]) -> None:
        self.activation: Tensor | None = None
        self._hooked = hooked
        self.remembered: list[tuple[str, tuple[Any, dict[str, int]]]] = []
        self._place = place
        self._open: list[_Start] = []
        self._counts: collections.Counter[str] = collections.Counter()

    def starter(self) -> Callable[..., None]:
        """A pre-hook for every module."""

        def start(_module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = tensors_of((args, kwargs))
            versions = [tensor._version for tensor in inputs]  # noqa: SLF001 - PyTorch offers no public name for it.
            self._open.append(_Start(inputs, versions, len(self.remembered), self._counts.copy()))

        return start

    def finisher(self, path: str) -> Callable[..., None]:
        """A hook for one module, which raises `Reached` at the tap."""

        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            begun = self._open.pop()
            index = self._counts[path]
            self._counts[path] += 1
            if (path, index) == (self._place.path, self._place.call):
                self.activation = pick(output, self._place.output).clone()
                raise Reached
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


class Tail:
    """Replays what the front remembered and puts the caller's activation in its place.

    Attributes:
        is_replaced: whether the place was reached.
    """

    def __init__(
        self,
        place: TapName,
        activation: Tensor,
        remembered: Mapping[str, tuple[Any, Mapping[str, int]]],
        owned: Collection[int],
        mode: Before | None,
    ) -> None:
        self._owned = owned
        self._mode = mode
        self.is_replaced = False
        self._place = place
        self._activation = activation
        self._remembered = remembered
        self._counts: collections.Counter[str] = collections.Counter()

    def replay(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What to call instead of a module's forward: it gives what was remembered of a call, or calls it."""

        def replay(*args: Any, **kwargs: Any) -> Any:
            name = f"{path}#{self._counts[path]}"
            if name not in self._remembered:
                return forward(*args, **kwargs)
            output, inside = self._remembered[name]
            self._counts.update(inside)
            return _copied(output)

        return replay

    def finisher(self, path: str) -> Callable[..., Any]:
        """A hook for one module, which counts its calls and puts the activation in place at the tap."""

        def finish(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            index = self._counts[path]
            self._counts[path] += 1
            if (path, index) != (self._place.path, self._place.call):
                return output
            self.is_replaced = True
            value = pick(output, self._place.output)
            if isinstance(self._mode, MoreRows):  # The value has one row, and so has its memory.
                onward = self._activation.clone() if self._mode.is_copying else self._activation
            else:
                onward = handed_on(self._activation, value, (args, kwargs), self._owned)
            if self._mode is not None:
                self._mode.reach(value, onward)
            return put(output, self._place.output, onward)

        return finish


def _copied(output: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, output)

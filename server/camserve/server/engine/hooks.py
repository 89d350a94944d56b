"""Forward hooks that keep a module's values, and leave the module as it was.

`HookedProgram` enters these contexts around one forward of an `nn.Module` it owns: `recorded` lists the calls, `tapped`
keeps activations for a gradient. Hooks exist only inside a `with` block and are gone after it, also when the forward raised.
Paths rather than modules name things here, because an unflattened export holds one module under several objects.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camserve.server.engine.program import Call, TapName

__all__ = ["Taps", "keys_of", "pick", "plain_attention", "put", "recorded", "tapped"]

# Every module of a program with the path its calls are counted under, in registration order.
Modules = Sequence[tuple[str, nn.Module]]


def keys_of(output: Any) -> tuple[str, ...] | None:
    """Names the floating tensors a module returned.

    Returns:
        `()` for a single tensor; indices as text for a tuple or list, keys for a mapping; None where nothing can be tapped.
    """
    if isinstance(output, Tensor):
        return () if output.is_floating_point() else None
    return (
        tuple(key for key, value in _items(output) if isinstance(value, Tensor) and value.is_floating_point()) or None
    )


def _items(output: Any) -> list[tuple[str, Any]]:
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items()]
    if isinstance(output, (tuple, list)):
        return [(str(index), value) for index, value in enumerate(output)]
    return []


def pick(output: Any, key: str | None) -> Tensor:
    """Returns the tensor that `key` names in a module's output, or the output itself for None."""
    value = output if key is None else dict(_items(output))[key]
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor at {key!r}, the module returned {type(value).__name__}")
    return value


def put(output: Any, key: str | None, value: Tensor) -> Any:
    """Returns `output` with the tensor at `key` replaced; containers are copied, never changed, and keep their type."""
    if key is None:
        return value
    if isinstance(output, MutableMapping):
        changed = copy.copy(output)
        changed[next(name for name in output if str(name) == key)] = value
        return changed
    if isinstance(output, Mapping):
        return {name: value if str(name) == key else other for name, other in output.items()}
    values = [value if str(index) == key else other for index, other in enumerate(output)]
    if hasattr(output, "_make"):  # A named tuple takes its fields one by one.
        return output._make(values)
    return tuple(values) if isinstance(output, tuple) else values


class Taps:
    """What a tapped forward has met so far.

    Attributes:
        values: the activation kept at each place; every one requires grad.
        counts: how often each tapped path has been called.
    """

    def __init__(self) -> None:
        self.values: dict[TapName, Tensor] = {}
        self.counts: collections.Counter[str] = collections.Counter()


@contextlib.contextmanager
def tapped(modules: Modules, places: Collection[TapName]) -> Iterator[Taps]:
    """Keeps the value at each place during the forward in the body.

    Args:
        modules: the program's modules by path.
        places: names with their call index filled in.
    """
    taps = Taps()
    paths = {place.path for place in places}

    def hook_for(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            index = taps.counts[path]
            taps.counts[path] += 1
            for place in places:
                if place.path == path and place.call == index:
                    taps.values[place], onward = _tap(pick(output, place.output))
                    output = put(output, place.output, onward)
            return output

        return hook

    with contextlib.ExitStack() as hooks:
        for path, module in modules:
            if path in paths:
                hooks.callback(module.register_forward_hook(hook_for(path)).remove)
        yield taps


def _tap(value: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a value into the one that is kept and the one that goes on.

    Two copies, because both ends can be written to: an identity layer returns its caller's own tensor, which the caller may
    change in place, and the next layer may change what it is given. A value without a graph is the earliest tap on its path
    and becomes a leaf; nothing before it is differentiated.
    """
    kept = value.clone()
    if not kept.requires_grad:
        kept = kept.detach().requires_grad_()
    return kept, kept.clone()


@contextlib.contextmanager
def recorded(modules: Modules) -> Iterator[list[Call]]:
    """Lists every module call of the forward in the body, in order of completion: children before their container."""
    calls: list[Call] = []
    counts: collections.Counter[str] = collections.Counter()

    def hook_for(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            keys = keys_of(output)
            refusal = "" if keys is not None else f"it returns no floating-point tensor but {_kind_of(output)}"
            calls.append(Call(path=path, index=counts[path], outputs=keys or (), refusal=refusal))
            counts[path] += 1

        return hook

    with contextlib.ExitStack() as hooks:
        for path, module in modules:
            hooks.callback(module.register_forward_hook(hook_for(path)).remove)
        yield calls


def _kind_of(output: Any) -> str:
    return f"a tensor of {output.dtype}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keeps attention layers off their fused inference path inside the body.

    That path is taken only where no gradient is wanted, has other last bits, and would make `run` and `capture` disagree.
    The switch is PyTorch's and global to the process; it is put back afterwards.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(value=before)

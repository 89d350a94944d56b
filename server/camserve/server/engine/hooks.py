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
from torch.utils import _pytree as pytree

from camserve.server.engine.program import Call, TapName

__all__ = [
    "Modules",
    "Taps",
    "addresses_of",
    "is_writable",
    "keys_of",
    "pick",
    "plain_attention",
    "put",
    "recorded",
    "shares_memory",
    "tapped",
    "tensors_of",
]

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
        self._parted: dict[TapName, list[tuple[Tensor, int]]] = {}

    def watch(self, place: TapName, *tensors: Tensor) -> None:
        """Notes tensors that were one in the model and are two now."""
        self._parted[place] = [(tensor, tensor._version) for tensor in tensors]  # noqa: SLF001 - There is no public name.

    def parted(self) -> frozenset[TapName]:
        """Places where one of the two was changed in place later, so that in the model both would have been."""
        return frozenset(
            place
            for place, tensors in self._parted.items()
            if any(tensor._version != version for tensor, version in tensors)  # noqa: SLF001
        )


@contextlib.contextmanager
def tapped(
    modules: Modules, places: Collection[TapName], *, owned: Collection[int], rejoined: Collection[TapName] = ()
) -> Iterator[Taps]:
    """Keeps the value at each place during the forward in the body.

    Args:
        modules: the program's modules by path.
        places: names with their call index filled in.
        owned: addresses of the memory of parameters and buffers, which is never written to.
        rejoined: places that `Taps.parted` named after an earlier try.
    """
    taps = Taps()
    paths = {place.path for place in places}

    def hook_for(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            index = taps.counts[path]
            taps.counts[path] += 1
            for place in places:
                if place.path == path and place.call == index:
                    value = pick(output, place.output)
                    is_shared = shares_memory(value, (args, kwargs)) and is_writable(value, owned)
                    kept = value.clone()
                    if not kept.requires_grad:
                        # The earliest tap on its path: nothing before it is differentiated.
                        kept = kept.detach().requires_grad_()
                    taps.values[place] = kept
                    if is_shared and (not value.requires_grad or place in rejoined):
                        onward = value.copy_(kept)
                    else:
                        onward = kept.clone()
                        if is_shared:
                            taps.watch(place, value, onward)
                    output = put(output, place.output, onward)
            return output

        return hook

    with contextlib.ExitStack() as hooks:
        for path, module in modules:
            if path in paths:
                hooks.callback(module.register_forward_hook(hook_for(path), with_kwargs=True).remove)
        yield taps


def shares_memory(value: Tensor, arguments: Any) -> bool:
    """Whether a module returned memory of its arguments, as identities, in-place activations and views do.

    The caller may still hold that memory and change it, or read it after the layer's result was changed. So the tapped value
    goes on in the same memory where it can: always at the earliest tap on a path, where no graph remembers the old content,
    and at later ones only if somebody does change it, since otherwise overwriting would spoil gradients for nothing.
    """
    address = value.untyped_storage().data_ptr()
    return any(tensor.untyped_storage().data_ptr() == address for tensor in tensors_of(arguments))


def is_writable(value: Tensor, owned: Collection[int]) -> bool:
    """Whether `copy_` into a tensor is defined and changes nothing of the model."""
    has_overlap = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    return not has_overlap and value.untyped_storage().data_ptr() not in owned


def addresses_of(module: nn.Module) -> frozenset[int]:
    """Where the parameters and buffers of a module lie in memory."""
    tensors = [*module.parameters(), *module.buffers()]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def tensors_of(values: Any) -> list[Tensor]:
    """Every tensor in a structure."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


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

"""Forward hooks that keep a module's values, and leave the module as it was.

`HookedProgram` enters these contexts around one forward of an `nn.Module` it owns: `recorded` lists the calls, `tapped`
keeps activations for a gradient. Hooks exist only inside a `with` block and are gone after it, also when the forward raised.
Paths rather than modules name things here, because an unflattened export holds one module under several objects.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad_mode
from torch.utils import _pytree as pytree

from camserve.server.engine.program import Call, TapName

__all__ = [
    "Modules",
    "Taps",
    "addresses_of",
    "forward_replaced",
    "handed_on",
    "hooks_on",
    "keys_of",
    "pick",
    "plain_attention",
    "put",
    "recorded",
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
        values: the activation kept at each place; every one requires grad, if gradients are enabled.
        counts: how often each tapped path has been called.
    """

    def __init__(self) -> None:
        self.values: dict[TapName, Tensor] = {}
        self.counts: collections.Counter[str] = collections.Counter()


@contextlib.contextmanager
def tapped(modules: Modules, places: Collection[TapName], *, owned: Collection[int]) -> Iterator[Taps]:
    """Keeps the value at each place during the forward in the body.

    Args:
        modules: the program's modules by path.
        places: names with their call index filled in.
        owned: addresses of the memory of parameters and buffers, which is never written to.
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
                    kept = value.clone()
                    if torch.is_grad_enabled() and not kept.requires_grad:
                        # The earliest tap on its path: nothing before it is differentiated.
                        kept = kept.detach().requires_grad_()
                    taps.values[place] = kept
                    output = put(output, place.output, handed_on(kept, value, (args, kwargs), owned))
            return output

        return hook

    with contextlib.ExitStack() as hooks:
        for path, module in modules:
            if path in paths:
                hooks.callback(module.register_forward_hook(hook_for(path), with_kwargs=True).remove)
        yield taps


def handed_on(kept: Tensor, value: Tensor, arguments: Any, owned: Collection[int]) -> Tensor:
    """Returns what the model goes on with instead of a layer's value: always a copy, which in-place layers may change.

    Identities and in-place activations return the very tensor they were given. Their caller may hold it under another name, so
    there the copy goes into that tensor. Where it has the same bytes, gradients that remember the tensor stay valid, hence its
    version does not count up.

    Args:
        kept: what the model is to go on with.
        value: what the layer returned, of the same shape.
        arguments: what the layer was given.
        owned: addresses of the model's own memory, which is not written to.
    """
    is_argument = any(value is argument for argument in tensors_of(arguments))
    has_overlap = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    if not is_argument or has_overlap or value.untyped_storage().data_ptr() in owned:
        return kept.clone()
    try:
        with grad_mode._unsafe_preserve_version_counter(value):  # noqa: SLF001 - There is no public name for it.
            return value.copy_(kept)
    except RuntimeError:
        # One of several views, such as the query of q, k, v = x.unbind(0): autograd lets nobody write to those.
        return kept.clone()


def addresses_of(module: nn.Module) -> frozenset[int]:
    """Where the parameters and buffers of a module lie in memory."""
    tensors = [*module.parameters(), *module.buffers()]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def hooks_on(modules: Modules) -> int:
    """How many forward hooks these modules have, whoever put them there; a module under several paths counts once."""
    found = {id(module): module for _, module in modules}.values()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in found)  # noqa: SLF001


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
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module another `forward` inside the body; hooks alone cannot skip a call."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


class _FusedAttention:
    """PyTorch's switch of the fused inference path, which is one for all threads: put back when the last one has done with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = True

    def off(self) -> None:
        with self._lock:
            if not self._users:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(value=False)
            self._users += 1

    def back(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                torch.backends.mha.set_fastpath_enabled(value=self._before)


_FUSED_ATTENTION = _FusedAttention()


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keeps attention layers off their fused inference path inside the body.

    That path is taken only where no gradient is wanted, has other last bits, and would make `run` and `capture` disagree. A model
    may be loaded in one thread while another one serves; so neither puts the switch back while the other is inside.
    """
    _FUSED_ATTENTION.off()
    try:
        yield
    finally:
        _FUSED_ATTENTION.back()

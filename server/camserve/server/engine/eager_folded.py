"""Rewrites a copy of an eager model for speed: batch normalisation folded into the convolution before it, weights channels last.

Arrives: a module, which is only read, and an input. Leaves: a copy with the same paths, whose folded normalisations are
identities, and the paths of the convolutions whose own value is gone. `eager.py` makes a program of it; `plans.py` tries it out.

What reads a convolution's output is seen in one forward. Should another input take other ways, the trial of `plans.py` cannot
tell either; a model whose layers depend on the input's values is not for this.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["rewritten_module"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Subclasses may do more than normalise.
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SHAPE_READS = frozenset({Tensor.dim, Tensor.size, Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__})  # type: ignore[attr-defined]


def rewritten_module(
    module: nn.Module, inputs: Sequence[Tensor], *, channels_last: bool
) -> tuple[nn.Module, frozenset[str]]:
    """The rewritten copy, and the paths of its convolutions that were folded.

    Args:
        module: in eval mode.
        inputs: of one forward.
        channels_last: whether to lay the weights of convolutions over two axes out channels last.
    """
    pairs = _pairs(module, inputs)
    mine = copy.deepcopy(module)
    for conv_path, norm_path in pairs:
        conv: Any = mine.get_submodule(conv_path)
        norm: Any = mine.get_submodule(norm_path)
        _replace(mine, conv_path, fuse_conv_bn_eval(conv, norm))
        _replace(mine, norm_path, nn.Identity())
    if channels_last:
        _lay_out(mine)
    return mine, frozenset(conv for conv, _ in pairs)


def _lay_out(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last)


class _Readers(TorchFunctionMode):
    """Counts, during a forward, the functions that are given each tensor, by its identity; reading a shape does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[int] = collections.Counter()

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SHAPE_READS:
            given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            self.counts.update(given)
        return func(*args, **kwargs)


def _pairs(module: nn.Module, inputs: Sequence[Tensor]) -> list[tuple[str, str]]:
    """Convolutions and the normalisations that alone read them, each called once and registered once, by path."""
    first = {id(child): path for path, child in module.named_modules()}
    registered = collections.Counter(id(child) for _, child in module.named_modules(remove_duplicate=False))
    made: dict[int, str] = {}
    kept: list[Any] = []
    calls: collections.Counter[str] = collections.Counter()
    found: list[tuple[str, str, int]] = []

    def seen(child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        path = first[id(child)]
        calls[path] += 1
        kept.append(output)  # An identity may serve again once its tensor is gone.
        if type(child) in _CONVOLUTIONS:
            made[id(output)] = path
        elif given and id(given[0]) in made:
            found.append((made[id(given[0])], path, id(given[0])))

    readers = _Readers()
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for child in module.modules():
            if type(child) in _CONVOLUTIONS or (type(child) in _NORMALISATIONS and _has_statistics(child)):
                hooks.callback(child.register_forward_hook(seen).remove)
        hooks.enter_context(readers)
        module(*(value.clone() for value in inputs))
    alone = {path for identity, path in first.items() if registered[identity] == 1 and calls[path] == 1}
    return [(conv, norm) for conv, norm, value in found if {conv, norm} <= alone and readers.counts[value] == 1]


def _has_statistics(norm: Any) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _replace(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)

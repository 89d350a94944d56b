"""Redirects the attention of an eager model, however it is called, to `hooked_attention.py` during one forward.

`EagerProgram.capture` enters `watched_attention` around its forward. What is redirected are calls of PyTorch functions, so that
it does not matter whether a model calls them itself or through `nn.MultiheadAttention`.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from camserve.server.engine.hooked_attention import Attentions
from camserve.server.engine.program import ProgramKind

__all__ = ["watched_attention"]

_SOFTMAX = (torch.softmax, torch.special.softmax, Tensor.softmax, functional.softmax)


@contextlib.contextmanager
def watched_attention(rows: int) -> Iterator[list[Tensor]]:
    """Computes attention step by step for the forward in the body.

    Args:
        rows: of the batch.

    Yields:
        The probabilities, (b, heads, queries, keys), as far as the forward has come.

    Raises:
        Unsupported: after the body: there was no attention, or some of another shape.
    """
    attentions = Attentions(ProgramKind.EAGER, rows)
    with _Redirect(attentions):
        yield attentions.values
    attentions.check()


class _Redirect(TorchFunctionMode):
    """Sees every call of a PyTorch function from Python; what a function calls inside itself is not seen."""

    def __init__(self, attentions: Attentions) -> None:
        super().__init__()
        self._attentions = attentions

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention or func is torch.ops.aten.scaled_dot_product_attention:
            return self._attentions.attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return self._attentions.softmax(result, dim) if isinstance(dim, int) else result
        return result

    def _multi_head(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Runs `nn.MultiheadAttention`'s function on names of our own: it finds the fused attention among its globals.

        Only a copy of the function sees them; PyTorch's own is left alone, for other threads use it.
        """
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        wants_weights, is_averaging = given.arguments["need_weights"], given.arguments["average_attn_weights"]
        given.arguments["need_weights"] = False
        names = {
            **func.__globals__,
            "scaled_dot_product_attention": self._attentions.attend,
            "has_torch_function": lambda _tensors: False,
        }
        copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        copy.__kwdefaults__ = func.__kwdefaults__
        before = len(self._attentions.values)
        output, _ = copy(*given.args, **given.kwargs)
        if not wants_weights or len(self._attentions.values) == before:
            return output, None
        weights = self._attentions.values[-1]
        weights = weights.mean(1) if is_averaging else weights
        return output, weights if given.arguments["query"].dim() == 3 else weights.squeeze(0)

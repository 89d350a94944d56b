"""A second form of an archive for forwards that are only scored, many times over: folded, fused, laid out as the device likes.

Amplified methods run thousands of forwards whose activations nobody looks at. `ScriptProgram.quick` has them run by this form:
constants folded (batch normalisation into convolutions), operators fused, weights and inputs channels last. Last bits differ from
the archive's own forward, so the two are compared on the first input of each shape; where they differ by more than rounding
explains, or torch cannot rewrite the archive, its own forward is used. It holds a second copy of the weights, made at first use.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from camserve.server.engine.script_graph import interpreted

__all__ = ["QuickForm"]

# Largest difference, relative to the largest output: rounding through some hundred layers, seen up to a tenth of these.
_TOLERANCE: Final[Mapping[torch.dtype, float]] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


class QuickForm:
    """The rewritten archive; made once, from one that is not changed by it.

    Args:
        archive: in eval mode, on its device, in its dtype.
        device: where that is.
        dtype: which.
    """

    def __init__(self, archive: torch.jit.ScriptModule, device: torch.device, dtype: torch.dtype) -> None:
        self._tolerance = _TOLERANCE[dtype]
        self._forward = _rewritten(archive, device)
        self._verdicts: dict[tuple[torch.Size, ...], bool] = {}

    def run(self, arguments: list[Any], original: Callable[[], Any]) -> Any:
        """One forward without grad.

        Args:
            arguments: of the archive's forward.
            original: runs the archive itself on them.
        """
        shapes = tuple(argument.shape[1:] for argument in arguments if isinstance(argument, Tensor))
        if self._forward is None or self._verdicts.get(shapes) is False:
            return original()
        outputs = self._run(arguments)
        if shapes not in self._verdicts:
            self._verdicts[shapes] = outputs is not None and _is_close(outputs, original(), self._tolerance)
        return outputs if self._verdicts[shapes] and outputs is not None else original()

    def _run(self, arguments: list[Any]) -> Any:
        """The rewritten forward's outputs; None where it fails, and the original says why or does not."""
        if self._forward is None:
            return None
        try:
            with torch.no_grad(), interpreted():
                return self._forward(*map(_channels_last, arguments))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None


def _rewritten(archive: torch.jit.ScriptModule, device: torch.device) -> Callable[..., Any] | None:
    """None where torch cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That TorchScript is deprecated is no news to whoever serves it.
            mine = copy.deepcopy(archive)
            for tensor in (*mine.parameters(), *mine.buffers()):
                if tensor.ndim == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
            # Freezing takes the flag away; an archive may have been frozen before it was saved.
            frozen = torch.jit.freeze(mine) if hasattr(mine, "training") else mine
            # What it fuses on CUDA is fused for shapes it has seen; folding is what helps there.
            return torch.jit.optimize_for_inference(frozen) if device.type == "cpu" else frozen
    except RuntimeError:
        return None


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _is_close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two structures of tensors are alike and differ by no more than `tolerance` of each one's largest value."""
    if isinstance(other, Tensor):
        if not isinstance(one, Tensor) or one.shape != other.shape:
            return False
        if not other.is_floating_point():
            return bool(torch.equal(one, other))
        scale = float(other.double().abs().amax()) if other.numel() else 0.0
        return bool(((one.double() - other.double()).abs() <= tolerance * scale).all())
    if isinstance(other, Mapping):
        is_alike = isinstance(one, Mapping) and one.keys() == other.keys()
        return is_alike and all(_is_close(one[key], value, tolerance) for key, value in other.items())
    if isinstance(other, tuple | list):
        is_alike = isinstance(one, tuple | list) and len(one) == len(other)
        return is_alike and all(_is_close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return bool(one == other)

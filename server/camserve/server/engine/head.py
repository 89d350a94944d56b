"""Finds the linear head that the original CAM needs: class scores that are the average of a map times one weight matrix.

`probe.py` asks at load. Nothing is read from layer types or names, which archives lose: every matrix of a fitting shape is tried
and kept only if the numbers agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["LinearHead", "find_linear_head"]

# Largest difference to the model's own logits, relative to the largest logit. Averaging in another order explains these.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearHead:
    """Class scores are `activation.mean(space) @ weight.T + bias`.

    Attributes:
        weight: (classes, c), the model's own tensor or a view of it.
        bias: (classes), or None.
    """

    weight: Tensor
    bias: Tensor | None


def find_linear_head(tensors: Mapping[str, Tensor], activation: Tensor, logits: Tensor) -> LinearHead | None:
    """Looks for the weights that turn one layer's averaged activation into the class scores.

    Args:
        tensors: the program's, by any name.
        activation: (b, c, *space) at the layer; several unlike rows, since the numbers are the proof.
        logits: (b, classes) of the same forward.

    Returns:
        The head, or None if something else lies between this layer and the scores.
    """
    if logits.ndim != 2 or activation.ndim < 3:
        return None
    means = activation.detach().double().flatten(2).mean(2)
    wanted = logits.detach().double()
    if not means.any() or not wanted.isfinite().all():
        return None
    allowed = _TOLERANCE.get(logits.dtype, 1e-4) * float(wanted.abs().max())
    biases = [tensor for tensor in tensors.values() if tensor.shape == wanted.shape[1:] and tensor.is_floating_point()]
    for weight in _matrices(tensors, classes=wanted.shape[1], channels=means.shape[1]):
        scores = means @ weight.detach().double().T
        if not scores.any():
            continue  # An untrained head of zeros fits everywhere and proves nothing.
        for bias in [*biases, None]:
            error = wanted - scores if bias is None else wanted - scores - bias.detach().double()
            if float(error.abs().max()) <= allowed:
                return LinearHead(weight=weight.detach(), bias=None if bias is None else bias.detach())
    return None


def _matrices(tensors: Mapping[str, Tensor], *, classes: int, channels: int) -> Iterator[Tensor]:
    """Yields every tensor that can be read as (classes, channels): linear layers, 1x1 convolutions, transposed constants."""
    for tensor in tensors.values():
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.numel() != classes * channels:
            continue
        matrix = tensor.flatten(1)
        if matrix.shape == (classes, channels):
            yield matrix
        if matrix.shape == (channels, classes):
            yield matrix.T

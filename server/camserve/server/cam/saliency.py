"""How the channels of a map in input space become what is sent. `maps.finish_channels` calls."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.jobs import Saliency

__all__ = ["reduce_channels"]

# SmoothGrad's (arXiv:1706.03825): a few outstanding pixels would otherwise darken all others.
_GRAY_PERCENTILE = 99


def reduce_channels(values: Float[Tensor, "c *space"], saliency: Saliency) -> Float[Tensor, "*shape"]:
    """Brings a finite map's channels together; units stay those of the map.

    - COLOUR: kept apart and signed, as the last axis: (*space c).
    - GRAY: the sum of magnitudes, cut off at its 99th percentile (arXiv:1706.03825): (*space). Where fewer than one cell in a
      hundred is not zero, nothing is cut off, since nothing would be left.
    - POSITIVE, NEGATIVE: the largest value over the channels, the magnitude of the smallest; 0 where there is none: (*space).
    """
    if saliency is Saliency.COLOUR:
        return values.movedim(0, -1)
    if saliency is Saliency.POSITIVE:
        return values.amax(dim=0).clamp_min(0)
    if saliency is Saliency.NEGATIVE:
        return (-values.amin(dim=0)).clamp_min(0)
    magnitude = values.abs().sum(dim=0)
    limit = _percentile(magnitude, _GRAY_PERCENTILE)
    return torch.where(limit > 0, torch.minimum(magnitude, limit), magnitude)


def _percentile(values: Float[Tensor, "*space"], percent: int) -> Float[Tensor, ""]:
    """Interpolates linearly between the nearest ranks, as numpy does; `torch.quantile` refuses more than 16 million values."""
    place = (values.numel() - 1) * percent / 100
    below = math.floor(place)
    flat = values.flatten()
    low = flat.kthvalue(below + 1).values
    high = flat.kthvalue(min(below + 2, flat.numel())).values
    return low + (high - low) * (place - below)

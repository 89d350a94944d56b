"""What an amplified method may spend and in which order: its parameters checked, its units of work cut into chunks.

The methods that try things out on the model call this; nothing here knows a model. Every random number is drawn one unit of
work at a time, so that the size of the chunks, which depends on the device, changes no map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from camserve.server.cam.methods.method import Scene
from camserve.server.errors import InvalidRequest, Reason

__all__ = ["at_least_one", "choose_channels", "chunks", "draw_noise", "noise_share", "spread"]


def at_least_one(value: int | None, default: int, *, name: str, method: str) -> int:
    """A count that a request may set.

    Raises:
        InvalidRequest: it is set below 1.
    """
    if value is None:
        return default
    if value < 1:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{method} was asked to work with {name} {value}; it takes at least 1, or nothing for its own default",
            metadata={"method": method, "parameter": name, "value": value},
        )
    return value


def noise_share(value: float | None, default: float, *, method: str) -> float:
    """The standard deviation of noise as a share of a range.

    Raises:
        InvalidRequest: it is negative or no number.
    """
    if value is None:
        return default
    if not 0 <= value < math.inf:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{method} was asked for noise {value}; it takes a finite share of the range from 0 up, usually 0.1 to 0.2",
            metadata={"method": method, "parameter": "noise", "value": value},
        )
    return value


def chunks(total: int, rows: int) -> Iterator[slice]:
    """Cuts units 0 to total into runs of at most so many rows."""
    for start in range(0, total, rows):
        yield slice(start, min(start + rows, total))


def spread(total: int) -> Int[Tensor, "total"]:
    """An order of the units that soon covers all of them thinly, the same every time: a partial map then has no blank half."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))


def choose_channels(scene: Scene, candidates: Bool[Tensor, "c"], *, method: str) -> Int[Tensor, "chosen"]:
    """Indices of the channels to try, on the activation's device.

    All candidates in their own order; under a budget, `parameters.channels`, those of the largest mean magnitude of the gradient
    first, the lower index first among equals, which costs one gradient.

    Raises:
        InvalidRequest: the budget is below 1.
    """
    indices = candidates.nonzero().squeeze(1)
    budget = at_least_one(scene.parameters.channels, len(indices), name="channels", method=method)
    if budget >= len(indices):
        return indices
    magnitude = scene.gradient()[0].flatten(1).double().abs().mean(dim=1)[indices]
    return indices[torch.sort(magnitude, descending=True, stable=True).indices[:budget]]


def draw_noise(generator: torch.Generator, rows: int, shape: Sequence[int]) -> Float[Tensor, "rows *shape"]:
    """Standard normal numbers on the CPU, float32, each row drawn by itself.

    Where a row has a multiple of 16 numbers, these are also what torch draws for all rows at once from the same seed.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator) for _ in range(rows)])

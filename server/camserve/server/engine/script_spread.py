"""What crosses a cut for many copies of one row, made from what crosses for the row alone.

Arrives: the values that crossed for one row, and once per shape those that crossed for two copies of it. Leaves: the values as
the front would give them for any number of copies, without running it. `script.py` asks; ablations of an activation then pay for
the tail alone.

A value belongs to the row if it is twice as large for two rows: a tensor along one dimension, or an integer such as the batch
size. It belongs to all rows if it is the same for both. Everything else is refused rather than guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Along", "Ambiguous", "Crossing", "Growth", "grown", "growth_of"]

# Kernels may round differently for one row and for two; sums over the rows differ by far more.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """What crosses a cut besides the activation.

    Attributes:
        values: what the tail reads.
        inputs: what the front was given; empty once the values were spread.
    """

    values: tuple[Any, ...]
    inputs: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Along:
    """A tensor that grows along one dimension.

    Attributes:
        dim: which.
        is_interleaved: whether the rows alternate along it (`a a b b`, for two entries of one row) rather than follow each
            other (`a b a b`); for one entry a row there is no difference.
    """

    dim: int
    is_interleaved: bool = False


Growth: TypeAlias = Along | Literal["count"] | tuple["Growth", ...] | None
"""How a value depends on the number of rows: a tensor along a dimension, an integer as a count, by parts, or not at all."""


class Ambiguous(Exception):
    """It cannot be told how a value depends on the number of rows; the text describes the value. Never leaves `script.py`."""


def growth_of(once: Any, twice: Any) -> Growth:
    """How a value grows, from what it is for one row and for two copies of it.

    Raises:
        Ambiguous: neither twice as large nor the same.
    """
    match once, twice:
        case Tensor(), Tensor():
            return _tensor_growth(once, twice)
        case ((list() | tuple()), (list() | tuple())) if len(once) == len(twice):
            return tuple(map(growth_of, once, twice))
        case dict(), dict() if list(once) == list(twice):
            return tuple(map(growth_of, once.values(), twice.values()))
        case int(), int() if not isinstance(once, bool) and once != twice == 2 * once:
            return "count"
        case ((None | bool() | int() | float() | complex() | str() | torch.device() | torch.dtype()), _) if (
            once == twice
        ):
            return None
        case _:
            raise Ambiguous(f"a value that is {_described(once)} for one row and {_described(twice)} for two")


def _tensor_growth(once: Tensor, twice: Tensor) -> Growth:
    unclear = Ambiguous(f"a tensor of shape {tuple(once.shape)} for one row and {tuple(twice.shape)} for two")
    if once.dim() != twice.dim():
        raise unclear
    changed = [dim for dim in range(once.dim()) if once.size(dim) != twice.size(dim)]
    if not changed and _is_close(once, twice):
        return None
    if len(changed) != 1 or twice.size(changed[0]) != 2 * once.size(changed[0]):
        raise unclear
    dim = changed[0]
    if once.size(dim) == 1:
        return Along(dim=dim)
    fitting = [
        along
        for along in (Along(dim=dim), Along(dim=dim, is_interleaved=True))
        if _is_close(_along(once, along, 2), twice)
    ]
    if len(fitting) != 1:
        raise unclear
    return fitting[0]


def grown(value: Any, growth: Growth, rows: int, *, is_expanded: bool) -> Any:
    """The value for so many copies of its row.

    Args:
        value: as it is for one row.
        growth: how it depends on their number.
        rows: at least 1.
        is_expanded: whether rows may share their memory, which costs none; not for what is viewed in another shape.
    """
    match value, growth:
        case _, None:
            return value
        case Tensor(), Along(dim=dim) if is_expanded and value.size(dim) == 1:
            return value.expand(*value.shape[:dim], rows, *value.shape[dim + 1 :])
        case Tensor(), Along():
            return _along(value, growth, rows)
        case int(), "count":
            return value * rows
        case dict(), tuple():
            pairs = zip(value.items(), growth, strict=True)
            return {key: grown(part, how, rows, is_expanded=is_expanded) for (key, part), how in pairs}
        case ((list() | tuple()), tuple()):
            parts = [grown(part, how, rows, is_expanded=is_expanded) for part, how in zip(value, growth, strict=True)]
            return _rebuilt(value, parts)
        case _:
            raise ValueError(f"{_described(value)} does not grow by {growth}")


def _along(value: Tensor, along: Along, rows: int) -> Tensor:
    if along.is_interleaved:
        return value.repeat_interleave(rows, along.dim)
    return torch.cat([value] * rows, along.dim)


def _rebuilt(like: Sequence[Any], parts: list[Any]) -> Any:
    if isinstance(like, list):
        return parts
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def _is_close(first: Tensor, second: Tensor) -> bool:
    if not first.is_floating_point():
        return torch.equal(first, second)
    scale = first[first.isfinite()].abs().amax().item() if first.isfinite().any() else 0.0
    return torch.allclose(first, second, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True)


def _described(value: Any) -> str:
    match value:
        case None | bool() | int() | float() | str():
            return repr(value)
        case list() | tuple() | dict():
            return f"a {type(value).__name__} of {len(value)}"
        case _:
            return f"a {type(value).__name__}"

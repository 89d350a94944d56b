"""Copies and comparisons of what a model takes and returns: tensors in tuples, lists and dicts of any depth."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["copied", "is_same"]


def copied(value: Any) -> Any:
    """The same structure with every tensor in memory of its own."""
    match value:
        case Tensor():
            return value.clone()
        case list():
            return [copied(element) for element in value]
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*(copied(element) for element in value))
        case tuple():
            return tuple(copied(element) for element in value)
        case dict():
            return {key: copied(element) for key, element in value.items()}
        case _:
            return value


def is_same(first: Any, second: Any) -> bool:
    """Whether two structures hold the same numbers, NaN being equal to NaN."""
    match first, second:
        case Tensor(), Tensor():
            # Only NaN differs from itself.
            return first.shape == second.shape and bool(
                ((first == second) | ((first != first) & (second != second))).all()  # noqa: PLR0124
            )
        case ((list() | tuple()), (list() | tuple())):
            return len(first) == len(second) and all(map(is_same, first, second))
        case dict(), dict():
            return first.keys() == second.keys() and all(is_same(value, second[key]) for key, value in first.items())
        case _:
            return bool(first == second)

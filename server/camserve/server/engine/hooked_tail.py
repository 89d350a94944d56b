"""Resumes a model for many rows without running, for many rows, what lies before the tap.

Arrives: the calls that PyTorch functions make during a tail (`rerun.py`), which up to the tap runs on the one row that the front
was given. Leaves: the same calls, with every value from before the tap that the rest of the model really uses made for all rows.
Everything else from there stays one row: its only purpose is to lead the Python code to the tap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from camserve.server.engine.hooked_rows import Copies, copies_of

__all__ = ["Before", "MoreRows", "Unclear"]


class Unclear(Exception):
    """It cannot be told what becomes of a value from before the tap."""


class Before(TorchFunctionMode):
    """Lists the tensors that are made before the tap, in order; the same code makes the same list for any number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.is_before = True
        self.made: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.values: list[Tensor] = []

    def reach(self, replaced: Tensor, activation: Tensor) -> None:  # noqa: ARG002 - other modes put one in the other's place.
        """Tells that the tap is reached."""
        self.is_before = False
        self.values = [tensor.clone() for tensor in self.made]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_before:
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and id(leaf) not in self.numbers:
                    self.numbers[id(leaf)] = len(self.made)
                    self.made.append(leaf)  # Held, so that its id stays its own.
        return result


class MoreRows(Before):
    """Goes on for many rows from the tap on.

    Args:
        rows: how many.
        copies: what becomes of each tensor from before the tap that is used after it, by its number in the list; filled in if
            `two` is given.
        two: the list for two copies of the row.
        is_copying: whether to go on with a copy of the activation, which the model may write to; a copy of thousands of rows
            costs more than what lies behind a late layer.
    """

    def __init__(
        self, rows: int, copies: dict[int, Copies], two: list[Tensor] | None = None, *, is_copying: bool = True
    ) -> None:
        super().__init__()
        self.is_copying = is_copying
        self._activation: Tensor | None = None
        self._version = 0
        self._rows = rows
        self._copies = copies
        self._two = two
        self._spread: dict[int, Tensor] = {}

    def reach(self, replaced: Tensor, activation: Tensor) -> None:
        """Goes on with the activation, also under the names that the tapped value has besides."""
        self.is_before = False
        self._activation, self._version = activation, activation._version  # noqa: SLF001 - There is no public name for it.
        number = self.numbers.get(id(replaced))
        if number is not None:
            self._spread[number] = activation

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_before:
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = self.of_all_rows((args, kwargs or {}))
        return func(*args, **kwargs)

    def has_written(self) -> bool:
        """Whether the model wrote to the activation."""
        return self._activation is not None and self._activation._version != self._version  # noqa: SLF001

    def of_all_rows(self, values: Any) -> Any:
        """The values with every tensor from before the tap made for all rows."""
        return pytree.tree_map_only(Tensor, self._of_all_rows, values)

    def _of_all_rows(self, value: Tensor) -> Tensor:
        number = self.numbers.get(id(value))
        if number is None or value is not self.made[number]:
            return value
        if number not in self._spread:
            # A copy, since the model may write to it; the same one for every use, since others are to see that.
            self._spread[number] = self._copies_of(number).make(value, self._rows).clone()
        return self._spread[number]

    def _copies_of(self, number: int) -> Copies:
        if number not in self._copies and self._two is not None:
            two = self._two[number] if number < len(self._two) else None
            copies = copies_of(self.made[number], two)
            if copies is None:
                raise Unclear(f"a tensor of shape {tuple(self.made[number].shape)} crosses the cut")
            self._copies[number] = copies
        if number not in self._copies:
            raise Unclear("this input takes another way through the model than the first one did")
        return self._copies[number]

"""Tells which values belong to the one row a program was run on, by running it on two copies of the row and comparing.

Arrives: a value as it was for one row and as it was for two copies. Leaves: a `Copies`, which makes the value for any number of
copies. `rerun.py` and `export_cut.py` spread with it what crosses a cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from camserve.server.engine.program import ProgramKind, TapName
from camserve.server.errors import Reason, Unsupported

__all__ = ["Copies", "are_near", "copies_of", "doubled", "shapes_of", "unclear"]

# Other batch sizes take other kernels: float32 sums differ in the last bits, and deep networks make more of it.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """What becomes of one value when the row is there several times.

    Attributes:
        how: `shared` by all rows; a number of which there is one for each row (`times`); a tensor that holds the rows one behind
            the other (`behind`), or every element of the row several times (`between`), along `dim`.
        dim: which.
    """

    how: Literal["shared", "times", "behind", "between"]
    dim: int = 0

    def make(self, value: Any, rows: int) -> Any:
        """The value for `rows` copies; a tensor may be an expanded view, which nobody must write to."""
        match self.how:
            case "shared":
                return value
            case "times":
                return value * rows
            case "between":
                return value.repeat_interleave(rows, self.dim)
        sizes = [rows if dim == self.dim else 1 for dim in range(value.dim())]
        if value.shape[self.dim] == 1:
            return value.expand([rows if dim == self.dim else -1 for dim in range(value.dim())])
        return value.repeat(sizes)


def copies_of(one: Any, two: Any) -> Copies | None:
    """Tells what became of a value, or None where that cannot be told."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return _copies_of_tensor(one, two)
    if type(one) is not type(two):
        return None
    if one == two:
        return Copies(how="shared")
    return Copies(how="times") if type(one) is int and two == 2 * one else None


def _copies_of_tensor(one: Tensor, two: Tensor) -> Copies | None:
    if one.dim() != two.dim():
        return None
    grown = [dim for dim in range(one.dim()) if one.shape[dim] != two.shape[dim]]
    if not grown:
        return Copies(how="shared") if are_near(one, two) else None
    if len(grown) > 1:
        return None
    choices = (Copies(how="behind", dim=grown[0]), Copies(how="between", dim=grown[0]))
    return next((copies for copies in choices if are_near(copies.make(one, 2), two)), None)


def are_near(expected: Any, found: Any) -> bool:
    """Whether two structures hold the same, but for the last bits that differ between batch sizes."""
    leaves, spec = pytree.tree_flatten(expected)
    others, other_spec = pytree.tree_flatten(found)
    return bool(spec == other_spec) and all(map(_is_near, leaves, others))


def _is_near(expected: Any, found: Any) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return type(expected) is type(found) and bool(expected == found)
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    if not expected.numel():
        return True
    largest = float(expected[expected.isfinite()].abs().max()) if bool(expected.isfinite().any()) else 0.0
    tolerance = max(_TOLERANCE, 8 * torch.finfo(expected.dtype).eps) * largest
    return torch.allclose(expected, found, rtol=0.0, atol=tolerance, equal_nan=True)


def doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Two copies of the one row in every input.

    Raises:
        ValueError: there is not one row.
    """
    if any(tensor.dim() == 0 or len(tensor) != 1 for tensor in inputs):
        raise ValueError(
            f"only what crosses for one row can be spread, not for {[tuple(tensor.shape) for tensor in inputs]}"
        )
    return [torch.cat([tensor, tensor]) for tensor in inputs]


def shapes_of(inputs: Sequence[Tensor]) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    """Under what a decision is remembered."""
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in inputs)


def unclear(kind: ProgramKind, tap: TapName, problem: str, advice: str) -> Unsupported:
    """The refusal to spread."""
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"this {kind} program cannot be resumed at layer '{tap}' for several copies of a row: {problem}; {advice}",
        metadata={"layer": tap, "kind": kind},
    )

"""Reads tensors that callers send ready for the model: bytes in, the model's dtype and shape out, or a refusal. For `decode.py`.

Nothing is resized, normalised or rounded. An element type other than the model's is taken only when every value survives.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import TensorInput

__all__ = ["check_tensor", "read_tensor"]

_DTYPES: Final = {"float32": "<f4", "float16": "<f2", "float64": "<f8", "uint8": "u1", "bfloat16": "<u2"}
# No model takes as many axes. The event loop multiplies the sizes and prints them: both must stay short.
_MAX_RANK: Final = 32


def check_tensor(tensor: TensorInput) -> int:
    """Checks a tensor's type, shape and bytes against each other.

    Returns:
        How many elements it has.

    Raises:
        InvalidRequest: TENSOR_MISMATCH.
    """
    if tensor.dtype not in _DTYPES:
        raise _mismatch(tensor, f"element type '{tensor.dtype}' is unknown; send one of {', '.join(_DTYPES)}")
    if len(tensor.shape) > _MAX_RANK:
        raise _mismatch(tensor, f"shape {_text(tensor.shape)} has more than {_MAX_RANK} axes")
    if any(size < 1 for size in tensor.shape):
        raise _mismatch(tensor, f"shape {_text(tensor.shape)} has a size below 1")
    elements = math.prod(tensor.shape)
    needed = elements * np.dtype(_DTYPES[tensor.dtype]).itemsize
    if len(tensor.data) != needed:
        raise _mismatch(
            tensor,
            f"tensor of {tensor.dtype} {_text(tensor.shape)} needs {needed} bytes, but {len(tensor.data)} arrived; "
            "send little-endian elements in C order",
        )
    return elements


class Expected(Protocol):
    """What a model takes for one row: an `InputRecipe`, or one of a card's extra inputs."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch axis."""
        ...

    @property
    def dtype(self) -> str:
        """A numpy name."""
        ...


def read_tensor(tensor: TensorInput, recipe: Expected, *, is_variable: bool = False) -> npt.NDArray[np.generic]:
    """Gives the model's input for one row: `recipe.shape`, `recipe.dtype`, C-contiguous and our own copy.

    Args:
        tensor: as it arrived.
        recipe: what the model takes.
        is_variable: whether it takes other sizes of space as well; the first axis, of channels, is as in the recipe.

    Raises:
        InvalidRequest: TENSOR_MISMATCH when type, shape or bytes differ from the recipe, or a value would change in the model's
            element type; INPUT_NOT_FINITE for NaN or infinity.
    """
    if not _fits(tuple(tensor.shape), recipe.shape, is_variable=is_variable):
        takes = ", ".join(["(" + str(recipe.shape[0]), *["any"] * (len(recipe.shape) - 1)]) + ")"
        raise _mismatch(
            tensor,
            f"tensor of {tensor.dtype} {_text(tensor.shape)}, {len(tensor.data)} bytes, does not fit the model, which takes "
            f"{recipe.dtype} {takes if is_variable else _text(recipe.shape)}, without a batch dimension",
        )
    check_tensor(tensor)
    values = np.frombuffer(tensor.data, _DTYPES[tensor.dtype])
    if tensor.dtype == "bfloat16":
        values = (values.astype("<u4") << 16).view("<f4")
    _check_finite(tensor, values)
    # Always a copy: what goes into a batch must not keep the request's bytes alive, nor be read-only.
    taken = values.copy() if values.dtype == recipe.dtype else _converted(tensor, values, recipe.dtype)
    return taken.reshape(tensor.shape)


def _converted(tensor: TensorInput, values: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.generic]:
    with np.errstate(over="ignore", invalid="ignore"):
        converted: npt.NDArray[np.generic] = values.astype(dtype)
        changed = converted.astype(values.dtype) != values
    if changed.any():
        first = int(changed.argmax())
        raise _mismatch(
            tensor,
            f"{tensor.dtype} value {values[first]!s} at element {first} cannot be held in {dtype}, which the model takes; "
            f"send {dtype}, rounded as you see fit",
        )
    return converted


def _fits(shape: tuple[int, ...], expected: tuple[int, ...], *, is_variable: bool) -> bool:
    if not is_variable:
        return shape == expected
    return len(shape) == len(expected) and shape[0] == expected[0]


def _check_finite(tensor: TensorInput, values: npt.NDArray[np.generic]) -> None:
    if values.dtype.kind != "f":
        return
    finite = np.isfinite(values)
    if not finite.all():
        first = int(finite.argmin())
        index = tuple(int(place) for place in np.unravel_index(first, tensor.shape))
        raise InvalidRequest(
            Reason.INPUT_NOT_FINITE,
            f"{int((~finite).sum())} of {values.size} elements are NaN or infinite, the first at {_text(index)}; "
            "send finite numbers only",
            metadata={"count": int((~finite).sum()), "first": _text(index)},
        )


def _text(shape: tuple[int, ...]) -> str:
    """A shape as it is printed; beyond the largest rank only its beginning, lest an error outgrow the request."""
    shown = ", ".join(map(str, shape[:_MAX_RANK]))
    return f"({shown})" if len(shape) <= _MAX_RANK else f"({shown}, and {len(shape) - _MAX_RANK} more)"


def _mismatch(tensor: TensorInput, message: str) -> InvalidRequest:
    metadata = {"dtype": tensor.dtype, "shape": _text(tensor.shape), "bytes": len(tensor.data)}
    return InvalidRequest(Reason.TENSOR_MISMATCH, message, metadata=metadata)

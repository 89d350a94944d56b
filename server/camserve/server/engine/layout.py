"""Which axes of an activation are channels and which are space, read from shapes.

Arrives: an activation's shape next to the input's, best at two input sizes. Leaves: a `Layout`, or a refusal that says what
is ambiguous: a map with its axes swapped looks plausible and is wrong, so nothing is guessed. `probe.py` detects,
`passes.py` and `cam/` bring activations to (b, c, *space) with `channels_first`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from camserve.server.errors import Reason, Unsupported

__all__ = ["Layout", "LayoutKind", "channels_first", "detect_layout"]

# Tokens in front of the patches that are known to occur: none, class, class + distillation, and 4 or 8 registers with and
# without class.
_PREFIXES = (0, 1, 2, 4, 5, 8, 9)


class LayoutKind(enum.StrEnum):
    """The order of an activation's axes."""

    CHANNELS_FIRST = "channels-first"
    """(b, c, *space): convolutional networks."""

    CHANNELS_LAST = "channels-last"
    """(b, *space, c): Swin and other NHWC blocks."""

    TOKENS = "tokens"
    """(b, n, c): transformers; n is the prefix tokens followed by the grid, row by row."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How to read an activation.

    Attributes:
        kind: the order of its axes.
        grid: cells along each spatial axis, (h, w) for images; for the input size it was detected at.
        channels: size of the channel axis.
        prefix: tokens before the grid that belong to no place, 0 for other kinds.
    """

    kind: LayoutKind
    grid: tuple[int, ...]
    channels: int
    prefix: int = 0


def channels_first(value: Tensor, layout: Layout) -> Tensor:
    """Brings an activation or its gradient to (b, c, *space); drops prefix tokens and folds the grid.

    Args:
        value: shape (b, c, *space), (b, *space, c) or (b, prefix + cells, c), as the layout says. The sizes of space may
            differ from the layout's grid for the first two kinds.
        layout: how to read it.

    Returns:
        A view of `value` with shape (b, c, *space).

    Raises:
        Unsupported: the value does not have this layout.
    """
    axes = 3 if layout.kind is LayoutKind.TOKENS else 2 + len(layout.grid)
    fits = value.ndim == axes and value.shape[_channel_axis(layout.kind)] == layout.channels
    if layout.kind is LayoutKind.TOKENS:
        fits = fits and value.shape[1] == layout.prefix + math.prod(layout.grid)
    if layout.kind is LayoutKind.TOKENS and value.ndim == axes and value.shape[2] == layout.channels and not fits:
        raise Unsupported(
            Reason.LAYER_UNUSABLE,
            f"this layer has {value.shape[1]} tokens for this input, and how they lie is known for {layout.prefix} + "
            f"{' x '.join(map(str, layout.grid))} only; send an input of the size on the model's card, or choose a layer that is "
            "no sequence of tokens",
            metadata={"tokens": value.shape[1], "known": layout.prefix + math.prod(layout.grid)},
        )
    if not fits:
        raise _refusal(f"an activation of shape {tuple(value.shape)} does not have the layout {layout}")
    if layout.kind is LayoutKind.CHANNELS_FIRST:
        return value
    if layout.kind is LayoutKind.CHANNELS_LAST:
        return value.movedim(-1, 1)
    return value[:, layout.prefix :].movedim(-1, 1).reshape(value.shape[0], layout.channels, *layout.grid)


def _channel_axis(kind: LayoutKind) -> int:
    return 1 if kind is LayoutKind.CHANNELS_FIRST else -1


def detect_layout(
    shape: Sequence[int],
    input_shape: Sequence[int],
    *,
    other: tuple[Sequence[int], Sequence[int]] | None = None,
    token_counts: Collection[int] = (),
    grids: Collection[tuple[int, ...]] = (),
    has_own_size: bool = False,
) -> Layout:
    """Reads the layout of one activation.

    Two input sizes tell space from channels by what changes. With one size, space is what shrank by the same factor along
    every axis of the input, which decides nothing for signals with one spatial axis.

    Args:
        shape: the activation's, (b, ...).
        input_shape: the model input's, (b, c, *space).
        other: the same two shapes at another input size, every spatial extent changed; None if the model takes only one.
        token_counts: sequence lengths seen in this model. An axis that long is not space: attention is (b, heads, n, n).
        grids: spatial extents of maps seen in this model at this input size; settle which grid a token count stands for.
        has_own_size: whether the model brings every input to a size of its own first, as SSD does: no activation changes with the
            input's. Such sizes are square, and so are the maps.

    Returns:
        The layout, its grid for `shape`.

    Raises:
        Unsupported: there are no spatial axes, or not exactly one reading is possible; the message says which.
    """
    shape, space = tuple(shape), tuple(input_shape[2:])
    if not shape or shape[0] != input_shape[0]:
        raise _refusal(f"the first axis of its shape {shape} is not the batch of {input_shape[0]}")
    moved = _moved_axes(shape, other)
    if space and len(shape) == 2 + len(space):
        return _detect_map(shape, space, moved, token_counts, has_own_size=has_own_size)
    if len(space) > 1 and len(shape) == 3:
        return _detect_tokens(shape, space, moved, token_counts, grids)
    raise _refusal(f"its shape {shape} has no axes for the {len(space)} spatial ones of the input")


def _moved_axes(shape: tuple[int, ...], other: tuple[Sequence[int], Sequence[int]] | None) -> frozenset[int]:
    """Returns the axes that another input size changes; none if there was no other size."""
    if other is None:
        return frozenset()
    if len(other[0]) != len(shape):
        raise _refusal(f"its shape is {shape} here and {tuple(other[0])} at another input size")
    return frozenset(axis for axis in range(1, len(shape)) if shape[axis] != other[0][axis])


def _detect_map(
    shape: tuple[int, ...],
    space: tuple[int, ...],
    moved: frozenset[int],
    token_counts: Collection[int],
    *,
    has_own_size: bool,
) -> Layout:
    readings = [
        Layout(kind=LayoutKind.CHANNELS_FIRST, grid=shape[2:], channels=shape[1]),
        Layout(kind=LayoutKind.CHANNELS_LAST, grid=shape[1:-1], channels=shape[-1]),
    ]
    readings = [layout for layout in readings if not set(layout.grid) & set(token_counts)]
    if not readings:
        raise _refusal(
            f"its shape {shape} has a spatial axis as long as the token sequence: attention rather than a map"
        )
    readings = [layout for layout in readings if _channel_axis(layout.kind) % len(shape) not in moved]
    if not moved or len(readings) > 1:
        even = [layout for layout in readings if _shrank_evenly(layout.grid, space)]
        is_square = has_own_size and len(even) != 1
        readings = [layout for layout in readings if len(set(layout.grid)) == 1] if is_square else even
    if len(readings) != 1:
        found = "both (b, c, *space) and (b, *space, c)" if readings else "neither (b, c, *space) nor (b, *space, c)"
        raise _refusal(f"its shape {shape} can be {found} for an input of {space}")
    return readings[0]


def _shrank_evenly(grid: tuple[int, ...], space: tuple[int, ...]) -> bool:
    """Whether one stride turns `space` into `grid`, up to one cell of padding or rounding."""
    if any(space[0] == extent and grid[0] != cells for extent, cells in zip(space, grid, strict=True)):
        return False
    smallest = max(extent / (cells + 1) for extent, cells in zip(space, grid, strict=True))
    largest = min(extent / (cells - 1) if cells > 1 else math.inf for extent, cells in zip(space, grid, strict=True))
    return smallest < largest


def _detect_tokens(
    shape: tuple[int, ...],
    space: tuple[int, ...],
    moved: frozenset[int],
    token_counts: Collection[int],
    grids: Collection[tuple[int, ...]],
) -> Layout:
    _, count, channels = shape
    readings = set(_token_grids(count, space, grids))
    if moved - {1} or not readings:
        raise _refusal(f"its shape {shape} is not (b, prefix + cells, c) for an input of {space}")
    is_sequence_known = 1 in moved or (count in token_counts and channels not in token_counts)
    if not is_sequence_known and any(_token_grids(channels, space, grids)):
        raise _refusal(f"its shape {shape} can be (b, n, c) and (b, c, n): both axes fit a grid of the input {space}")
    if len(readings) > 1:
        raise _refusal(f"its {count} tokens can be {_told(readings)}")
    ((prefix, grid),) = readings
    return Layout(kind=LayoutKind.TOKENS, grid=grid, channels=channels, prefix=prefix)


def _token_grids(
    count: int, space: tuple[int, ...], grids: Collection[tuple[int, ...]]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the (prefix, grid) pairs that `count` tokens can be; grids seen in the model rule out imagined ones."""
    seen = [grid for grid in grids if len(grid) == len(space)]
    exact = [tuple(e // p for e in space) for p in range(1, min(space) + 1) if all(e % p == 0 for e in space)]
    rounded = [tuple(e // p for e in space) for p in range(1, min(space) + 1)]
    for candidates in (seen, exact, rounded):
        fitting = [(count - math.prod(grid), grid) for grid in candidates if math.prod(grid) > 1]
        fitting = [(prefix, grid) for prefix, grid in fitting if prefix in _PREFIXES]
        yield from fitting
        if fitting:
            return


def _told(readings: Collection[tuple[int, tuple[int, ...]]]) -> str:
    return " or ".join(f"{prefix} + {'x'.join(map(str, grid))}" for prefix, grid in sorted(readings))


def _refusal(problem: str) -> Unsupported:
    return Unsupported(Reason.LAYER_UNUSABLE, f"the layout of this layer is unknown: {problem}")

"""Chooses the layers to explain when nobody says which, and one name among layers that hold the same value.

`probe.py` calls these with what one capture of every layer showed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from camserve.server.engine.layout import Layout, LayoutKind
from camserve.server.engine.program import Call, TapName

__all__ = ["best_name", "choose_default", "choose_stages"]


def choose_default(
    calls: Sequence[Call],
    layouts: Mapping[TapName, Layout],
    reaches: Mapping[TapName, bool | None],
    values: Mapping[TapName, Tensor],
    dense_channels: int = 0,
) -> TapName | None:
    """Picks the last layer that still has more than one cell and on whose cells the class scores depend.

    In a transformer that classifies by its class token, the patches of the last block have no influence any more. There the last
    block whose patches have one is chosen, rather than a projection inside the next block's attention.

    Args:
        calls: in order of execution.
        layouts: of the taps that have one, in order of execution.
        reaches: whether the gradient is not zero everywhere; None where there is no derivative, which excludes nothing.
        values: activations.
        dense_channels: of an output that is dense itself; a layer with as many explains nothing. 0 for other outputs.
    """
    candidates = _candidates(layouts, reaches, dense_channels)
    containers = _containers(calls)
    blocks = [tap for tap in candidates if tap.path in containers]
    for tap in reversed(candidates):
        if layouts[tap].kind is not LayoutKind.TOKENS or not blocks or tap in blocks:
            return best_name(tap, calls, values)
    return None


def choose_stages(
    calls: Sequence[Call],
    layouts: Mapping[TapName, Layout],
    reaches: Mapping[TapName, bool | None],
    values: Mapping[TapName, Tensor],
    dense_channels: int = 0,
) -> list[TapName]:
    """Picks a layer for each resolution, in order of execution: a sweep from fine and shallow to coarse and deep.

    That is the default where it has the resolution, else the last of the outermost containers that have it: many a block begins
    with a convolution that still has its predecessor's, and `layer1` says more than `layer2.0.relu#0`. Without containers it is
    the last layer.

    Args:
        calls: in order of execution.
        layouts: as for `choose_default`.
        reaches: likewise.
        values: activations.
        dense_channels: as for `choose_default`.
    """
    default = choose_default(calls, layouts, reaches, values, dense_channels)
    containers = _containers(calls)
    of_grid: dict[tuple[int, ...], list[TapName]] = {}
    for tap in _candidates(layouts, reaches, dense_channels):
        of_grid.setdefault(layouts[tap].grid, []).append(tap)
    stages = []
    for grid, taps in of_grid.items():
        if default is not None and layouts[default].grid == grid:
            stages.append(default)
            continue
        depths = {tap: tap.path.count(".") for tap in taps if tap.path in containers}
        outermost = [tap for tap, depth in depths.items() if depth == min(depths.values())]
        stages.append(best_name((outermost or taps)[-1], calls, values))
    order = list(layouts)
    return sorted(stages, key=order.index)


def _candidates(
    layouts: Mapping[TapName, Layout], reaches: Mapping[TapName, bool | None], dense_channels: int
) -> list[TapName]:
    return [
        tap
        for tap, layout in layouts.items()
        if math.prod(layout.grid) > 1 and reaches.get(tap) is not False and layout.channels != dense_channels
    ]


def best_name(tap: TapName, calls: Sequence[Call], values: Mapping[TapName, Tensor]) -> TapName:
    """Returns the best of the taps that hold the same value: `layer4` rather than `layer4.1.relu#1`.

    That is the outermost container, but none that holds the network's first layer as well: `features.12` says more than
    `features`. Without such a container it is the layer that made the value, not one that only handed it on.
    """
    value = values[tap]
    same = [other for other, seen in values.items() if seen.shape == value.shape and torch.equal(seen, value)]
    containers = _containers(calls)
    blocks = [
        other for other in same if other.path in containers and not f"{calls[0].path}.".startswith(f"{other.path}.")
    ]
    if blocks:
        return min(blocks, key=lambda other: other.path.count("."))
    return same[0]


def _containers(calls: Sequence[Call]) -> set[str]:
    """Paths of modules that call other modules."""
    parts = [call.path.split(".") for call in calls]
    return {".".join(path[:depth]) for path in parts for depth in range(1, len(path))}

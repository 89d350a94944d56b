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

# What torchvision's detectors call what makes features of a picture; "body" in it is what stands before a feature pyramid.
_BACKBONE = "backbone"


def choose_default(
    calls: Sequence[Call],
    layouts: Mapping[TapName, Layout],
    reaches: Mapping[TapName, bool | None],
    values: Mapping[TapName, Tensor],
    dense_channels: int = 0,
    *,
    is_detector: bool = False,
) -> TapName | None:
    """Picks the last layer that still has more than one cell and on whose cells the class scores depend.

    In a transformer that classifies by its class token, the patches of the last block have no influence any more. There the last
    block whose patches have one is chosen, rather than a projection inside the next block's attention.

    A detector's last layers serve some of its detections only, those of one size or one place. There it is the last layer that
    all of them share, as torchvision's detectors are built: in front of the feature pyramid, or, without one, the first output of
    the backbone.

    Args:
        calls: in order of execution.
        layouts: of the taps that have one, in order of execution.
        reaches: whether the gradient is not zero everywhere; None where there is no derivative, which excludes nothing.
        values: activations.
        dense_channels: of an output that is dense itself; a layer with as many explains nothing. 0 for other outputs.
        is_detector: whether the output is detections.
    """
    candidates = _candidates(layouts, reaches, dense_channels, is_detector=is_detector)
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
    *,
    is_detector: bool = False,
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
        is_detector: likewise.
    """
    default = choose_default(calls, layouts, reaches, values, dense_channels, is_detector=is_detector)
    containers = _containers(calls)
    of_grid: dict[tuple[int, ...], list[TapName]] = {}
    for tap in _candidates(layouts, reaches, dense_channels, is_detector=is_detector):
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
    layouts: Mapping[TapName, Layout], reaches: Mapping[TapName, bool | None], dense_channels: int, *, is_detector: bool
) -> list[TapName]:
    found = [
        tap
        for tap, layout in layouts.items()
        if math.prod(layout.grid) > 1 and reaches.get(tap) is not False and layout.channels != dense_channels
    ]
    return _shared(found) if is_detector else found


def _shared(candidates: list[TapName]) -> list[TapName]:
    """Those of a detector's backbone up to the last layer that every detection depends on; all if nothing has that name."""
    backbone = _inside(_BACKBONE, candidates) or candidates
    body = _inside(f"{_BACKBONE}.body", backbone)
    if body:
        return body
    last = next((place for place, tap in enumerate(backbone) if tap.path == _BACKBONE), len(backbone) - 1)
    return backbone[: last + 1]


def _inside(path: str, taps: Sequence[TapName]) -> list[TapName]:
    return [tap for tap in taps if f"{tap.path}.".startswith(f"{path}.")]


def best_name(tap: TapName, calls: Sequence[Call], values: Mapping[TapName, Tensor]) -> TapName:
    """Returns the best of the taps that hold the same value: `layer4` rather than `layer4.1.relu#1`.

    That is the outermost container, but none that holds the network's first layer as well: `features.12` says more than
    `features`; nor one of several outputs of a container if another will do: `body.layer4` says more than `body:3`. Without such
    a container it is the layer that made the value, not one that only handed it on.
    """
    value = values[tap]
    same = [other for other, seen in values.items() if seen.shape == value.shape and _is_equal(seen, value)]
    containers = _containers(calls)
    blocks = [
        other for other in same if other.path in containers and not f"{calls[0].path}.".startswith(f"{other.path}.")
    ]
    blocks = [other for other in blocks if other.output is None] or blocks
    if blocks:
        return min(blocks, key=lambda other: other.path.count("."))
    return same[0]


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two values are one; NaN, which a model may keep from its scores, is the same as itself here."""
    return torch.equal(one, other) or bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def _containers(calls: Sequence[Call]) -> set[str]:
    """Paths of modules that call other modules."""
    parts = [call.path.split(".") for call in calls]
    return {".".join(path[:depth]) for path in parts for depth in range(1, len(path))}

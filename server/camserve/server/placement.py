"""Places what a target says of the source onto the model's input: boxes, masks and points in, cells and boxes of the input out.

`pipeline.py` calls `placed` for each spec once its input is decoded and the geometry known; `encode.py` and `prediction.py` take
boxes the other way. Pure numpy. Coordinates of pixels count from 0 at the centre of the first; those of boxes from 0 at its
outer edge, so that the box (0, 0, width, height) is the whole picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import (
    BoolArray,
    Box,
    DetectionBox,
    Geometry,
    Mask,
    PlacedBox,
    PlacedRegion,
    Point,
    Region,
    Spec,
    Target,
)

__all__ = ["box_on_source", "placed"]


def placed(spec: Spec, geometry: Geometry | None, input_shape: Sequence[int]) -> Spec:
    """A spec whose target lies on the model's input: a `Region` becomes a `PlacedRegion`, a `DetectionBox` a `PlacedBox`.

    A pixel of the input is chosen where the source's pixel under its centre is, as labels are resized by their nearest; where a
    region is so small that this leaves none, those that hold a chosen pixel of the source are.

    Args:
        spec: any; others than these targets are given back as they are.
        geometry: how the input lies on the source; None for tensors, whose own cells the target is told in.
        input_shape: of one row, such as (3, 224, 224).

    Raises:
        InvalidRequest: nothing that the model saw is chosen, or the mask is not the source's size.
    """
    about = spec.target.about
    field = f"specs[{spec.index}].target"
    match about:
        case Region(index, pixels):
            cells = None if pixels is None else _cells(pixels, geometry, tuple(input_shape[1:]), f"{field}.region")
            return _about(spec, PlacedRegion(index=index, cells=cells))
        case DetectionBox(box, index, min_iou):
            lies = _flat(geometry, tuple(input_shape[1:]), f"{field}.detection.box")
            return _about(spec, PlacedBox(_box_on_input(box, lies, f"{field}.detection.box"), index, min_iou))
    return spec


def box_on_source(box: Box, geometry: Geometry | None) -> Box:
    """A box in pixels of the model's input, told in pixels of the source and cut off at its edges.

    Args:
        box: such as a detector returns.
        geometry: how the input lies on the source; None for tensors, whose boxes stay as they are.
    """
    if geometry is None:
        return box
    left, right = (_edge(x, geometry.scale_x, geometry.offset_x) for x in (box.left, box.left + box.width))
    top, bottom = (_edge(y, geometry.scale_y, geometry.offset_y) for y in (box.top, box.top + box.height))
    left, right = max(left, 0.0), min(right, geometry.source_width)
    top, bottom = max(top, 0.0), min(bottom, geometry.source_height)
    return Box(left, top, max(right - left, 0.0), max(bottom - top, 0.0))


def _edge(place: float, scale: float, offset: float) -> float:
    """An edge of the input's pixels as one of the source's; edges lie half a pixel before centres."""
    return scale * (place - 0.5) + offset + 0.5


def _about(spec: Spec, about: PlacedRegion | PlacedBox) -> Spec:
    target: Target = dataclasses.replace(spec.target, about=about)
    return dataclasses.replace(spec, target=target)


def _flat(geometry: Geometry | None, spatial: tuple[int, ...], field: str) -> Geometry:
    """The geometry, or for tensors one in which the input is its own source."""
    if geometry is not None:
        return geometry
    if len(spatial) != 2:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field} is a place in a picture, and this model's input has {len(spatial)} axes of space; choose cells by a mask",
            field=field,
            metadata={"dimensions": len(spatial)},
        )
    height, width = spatial
    return Geometry(source_width=width, source_height=height, input_width=width, input_height=height)


def _box_on_input(box: Box, lies: Geometry, field: str) -> Box:
    left, right = ((x - 0.5 - lies.offset_x) / lies.scale_x + 0.5 for x in (box.left, box.left + box.width))
    top, bottom = ((y - 0.5 - lies.offset_y) / lies.scale_y + 0.5 for y in (box.top, box.top + box.height))
    left, right = max(left, 0.0), min(right, lies.input_width)
    top, bottom = max(top, 0.0), min(bottom, lies.input_height)
    if left >= right or top >= bottom:
        raise _unseen(field, lies)
    return Box(left, top, right - left, bottom - top)


def _cells(pixels: Box | Mask | Point, geometry: Geometry | None, spatial: tuple[int, ...], field: str) -> BoolArray:
    """The chosen cells, of the input's spatial shape."""
    if isinstance(pixels, Mask):
        return _masked(pixels, geometry, spatial, f"{field}.mask")
    if isinstance(pixels, Point):
        lies = _flat(geometry, spatial, f"{field}.point")
        return _at_point(pixels, lies, f"{field}.point")
    lies = _flat(geometry, spatial, f"{field}.box")
    rows = _span(pixels.top, pixels.height, lies.source_height, lies.scale_y, lies.offset_y, lies.input_height)
    columns = _span(pixels.left, pixels.width, lies.source_width, lies.scale_x, lies.offset_x, lies.input_width)
    if not (rows.any() and columns.any()):
        raise _unseen(f"{field}.box", lies)
    return np.asarray(rows[:, None] & columns)


def _span(first: float, length: float, source: int, scale: float, offset: float, pixels: int) -> BoolArray:
    """Along one axis: which pixels of the input the source's pixels from `first` choose."""
    low, high = max(first, 0.0), min(first + length, float(source))
    if low >= high:
        return np.zeros(pixels, np.bool_)
    centres = scale * np.arange(pixels) + offset
    chosen = np.asarray((centres >= low - 0.5) & (centres < high - 0.5))
    if chosen.any():
        return chosen
    return _holding(np.arange(int(low), int(np.ceil(high))), scale, offset, pixels)


def _holding(
    places: np.ndarray[tuple[int, ...], np.dtype[np.int64]], scale: float, offset: float, pixels: int
) -> BoolArray:
    """Along one axis: the pixels of the input that hold these pixels of the source."""
    chosen = np.zeros(pixels, np.bool_)
    held = _nearest(places, scale, offset)
    chosen[held[(held >= 0) & (held < pixels)]] = True
    return chosen


def _nearest(
    places: np.ndarray[tuple[int, ...], np.dtype[np.int64]] | float, scale: float, offset: float
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The pixel of the input that lies under a place of the source; halves go to the later one, on every machine."""
    return np.asarray(np.floor((np.asarray(places) - offset) / scale + 0.5), np.int64)


def _at_point(point: Point, lies: Geometry, field: str) -> BoolArray:
    row, column = (
        int(_nearest(point.y, lies.scale_y, lies.offset_y)),
        int(_nearest(point.x, lies.scale_x, lies.offset_x)),
    )
    on_source = -0.5 <= point.x <= lies.source_width - 0.5 and -0.5 <= point.y <= lies.source_height - 0.5
    if not (on_source and 0 <= row < lies.input_height and 0 <= column < lies.input_width):
        raise _unseen(field, lies)
    cells = np.zeros((lies.input_height, lies.input_width), np.bool_)
    cells[row, column] = True
    return cells


def _masked(mask: Mask, geometry: Geometry | None, spatial: tuple[int, ...], field: str) -> BoolArray:
    expected = spatial if geometry is None else (geometry.source_height, geometry.source_width)
    if mask.shape != expected:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field} is {_text(mask.shape)}; the {'tensor' if geometry is None else 'upright source'} is {_text(expected)}",
            field=f"{field}.shape",
            metadata={"shape": _text(mask.shape), "expected": _text(expected)},
        )
    chosen: BoolArray = np.frombuffer(mask.data, np.uint8).reshape(mask.shape) != 0
    if geometry is None:
        return chosen
    rows = np.floor(geometry.scale_y * np.arange(geometry.input_height) + geometry.offset_y + 0.5).astype(np.int64)
    columns = np.floor(geometry.scale_x * np.arange(geometry.input_width) + geometry.offset_x + 0.5).astype(np.int64)
    seen_rows = (rows >= 0) & (rows < geometry.source_height)
    seen_columns = (columns >= 0) & (columns < geometry.source_width)
    cells = np.zeros((geometry.input_height, geometry.input_width), np.bool_)
    cells[np.ix_(seen_rows, seen_columns)] = chosen[np.ix_(rows[seen_rows], columns[seen_columns])]
    if not cells.any():
        source_rows, source_columns = np.nonzero(chosen)
        held_rows = _nearest(source_rows, geometry.scale_y, geometry.offset_y)
        held_columns = _nearest(source_columns, geometry.scale_x, geometry.offset_x)
        is_seen = (held_rows >= 0) & (held_rows < geometry.input_height)
        is_seen &= (held_columns >= 0) & (held_columns < geometry.input_width)
        cells[held_rows[is_seen], held_columns[is_seen]] = True
    if not cells.any():
        raise _unseen(field, geometry)
    return cells


def _unseen(field: str, lies: Geometry) -> InvalidRequest:
    seen = box_on_source(Box(0.0, 0.0, lies.input_width, lies.input_height), lies)
    told = (
        f"columns {seen.left:.0f} to {seen.left + seen.width:.0f}, rows {seen.top:.0f} to {seen.top + seen.height:.0f}"
    )
    return InvalidRequest(
        Reason.FIELD_INVALID,
        f"{field} lies outside of what the model saw of the source: {told}",
        field=field,
        metadata={"seen": told},
    )


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

"""Enlarges maps: bilinear, between cell centres, without antialias. Only numpy; called by `encode.py`.

A cell's centre has whole-number coordinates, the first 0. Between centres values are linear in each axis; beyond the outermost
centres they stay what they are there. The client's decoder does the same from the same text, in code of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from camserve.server.bands import bands
from camserve.server.jobs import FloatArray, Geometry

__all__ = ["map_geometry", "onto_source", "resample", "to_size"]

_FLOAT32_MAX = float(np.finfo(np.float32).max)

Coordinates: TypeAlias = npt.NDArray[np.floating]


def resample(values: FloatArray, rows: Coordinates, columns: Coordinates, out: FloatArray | None = None) -> FloatArray:
    """Reads a map at any coordinates.

    Args:
        values: (h w) float32.
        rows: (y) cell coordinates, clamped to [0, h - 1].
        columns: (x) cell coordinates, clamped to [0, w - 1].
        out: (y x) float32 to write to; None makes one.

    Returns:
        (y x) float32.
    """
    upper, lower, down = _between(rows, values.shape[0])
    left, right, across = _between(columns, values.shape[1])
    if float(values.max()) - float(values.min()) > _FLOAT32_MAX:
        # The difference of two neighbours would overflow; so rare that its cost does not matter.
        large = resample(values / np.float32(4), rows, columns, out)
        large *= np.float32(4)
        return large
    # This form, unlike a weighted sum, leaves a constant map exactly constant.
    wide = values[:, left] + (values[:, right] - values[:, left]) * across
    result: FloatArray = np.empty((len(rows), len(columns)), np.float32) if out is None else out
    for band in bands(*result.shape):
        above = wide[upper[band]]
        part = wide[lower[band]]
        part -= above
        part *= down[band, None]
        np.add(part, above, out=result[band])
    return result


def _between(coordinates: Coordinates, cells: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], FloatArray]:
    """The two cells around each coordinate and how far it is from the first, 0 to 1."""
    clamped = coordinates.clip(0, cells - 1)
    first = np.floor(clamped).astype(np.intp)
    return first, np.minimum(first + 1, cells - 1), (clamped - first).astype(np.float32)


def to_size(values: FloatArray, height: int, width: int) -> FloatArray:
    """Resizes (h w) to (height width) over the same extent, as torch's `F.interpolate(align_corners=False)` does.

    Result pixel i reads cell coordinate `(i + 0.5) * cells / pixels - 0.5`, clamped.
    """
    if values.shape == (height, width):
        return values
    return resample(values, _centres(values.shape[0], height), _centres(values.shape[1], width))


@lru_cache(maxsize=256)
def _centres(cells: int, pixels: int) -> Coordinates:
    return (np.arange(pixels) + 0.5) * (cells / pixels) - 0.5


def map_geometry(geometry: Geometry, map_height: int, map_width: int) -> Geometry:
    """How a map's cells lie on the source, given how the model's input does.

    The map covers the whole input: the centre of column j is input pixel `(j + 0.5) * input_width / map_width - 0.5`.

    Returns:
        A geometry whose `input_width` and `input_height` are the map's.
    """
    cell_width, cell_height = geometry.input_width / map_width, geometry.input_height / map_height
    return Geometry(
        source_width=geometry.source_width,
        source_height=geometry.source_height,
        input_width=map_width,
        input_height=map_height,
        scale_x=geometry.scale_x * cell_width,
        scale_y=geometry.scale_y * cell_height,
        offset_x=geometry.offset_x + geometry.scale_x * (0.5 * cell_width - 0.5),
        offset_y=geometry.offset_y + geometry.scale_y * (0.5 * cell_height - 0.5),
    )


def onto_source(values: FloatArray, geometry: Geometry) -> FloatArray:
    """Draws a map on its source.

    Source column x reads cell coordinate `u = (x - offset_x) / scale_x`. It was seen by the model when u lies in
    [-0.5, w - 0.5]; u is then clamped to [0, w - 1]. Rows likewise. Pixels not seen get the map's smallest value.

    Args:
        values: (h w) float32.
        geometry: of the map's cells, from `map_geometry`.

    Returns:
        (source_height source_width) float32.
    """
    height, width = values.shape
    rows = (np.arange(geometry.source_height) - geometry.offset_y) / geometry.scale_y
    columns = (np.arange(geometry.source_width) - geometry.offset_x) / geometry.scale_x
    seen_rows, seen_columns = _seen(rows, height), _seen(columns, width)
    result = np.full((geometry.source_height, geometry.source_width), values.min(), np.float32)
    resample(values, rows[seen_rows], columns[seen_columns], result[seen_rows, seen_columns])
    return result


def _seen(coordinates: Coordinates, cells: int) -> slice:
    """The run of coordinates, which increase, that lie on the map."""
    first = int(np.searchsorted(coordinates, -0.5, side="left"))
    return slice(first, int(np.searchsorted(coordinates, cells - 0.5, side="right")))

"""Where a heatmap's cells lie on the source image, and how values between cells are read.

`heatmaps.py` enlarges maps here exactly as the server does: bilinear between cell centres, flat beyond the outermost centres,
and the map's smallest value where the model did not look.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from camserve.v1 import heatmap_pb2

FloatArray: TypeAlias = npt.NDArray[np.float32]
Coordinates: TypeAlias = npt.NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Places a heatmap on its source: `x = scale_x * column + offset_x`, `y = scale_y * row + offset_y`.

    Columns and rows count cells, x and y source pixels, each from 0 at the centre of the first.

    Attributes:
        scale_x: source columns for one column of the heatmap.
        offset_x: source x of the first column's centre; negative when it lies outside.
        scale_y: source rows for one row of the heatmap.
        offset_y: source y of the first row's centre.
        source_width: columns of the source, EXIF orientation applied.
        source_height: rows of the source.
    """

    scale_x: float
    offset_x: float
    scale_y: float
    offset_y: float
    source_width: int
    source_height: int

    @classmethod
    def from_proto(cls, message: heatmap_pb2.Geometry) -> Geometry:
        """Returns the geometry a message holds."""
        return cls(
            scale_x=message.scale_x,
            offset_x=message.offset_x,
            scale_y=message.scale_y,
            offset_y=message.offset_y,
            source_width=message.source_width_pixels,
            source_height=message.source_height_pixels,
        )

    def place(self, values: FloatArray) -> FloatArray:
        """Returns the map on the source's pixel grid.

        Args:
            values: (h, w).

        Returns:
            float32 (source_height, source_width); pixels outside the cells' own area carry the map's smallest value.

        Raises:
            ValueError: when a scale is not positive.
        """
        if not (self.scale_x > 0 and self.scale_y > 0):
            raise ValueError(f"a geometry's scales must be positive, not {self.scale_x} and {self.scale_y}")
        height, width = values.shape
        rows = (np.arange(self.source_height) - self.offset_y) / self.scale_y
        columns = (np.arange(self.source_width) - self.offset_x) / self.scale_x
        placed = interpolate(values, rows, columns)
        placed[~_is_seen(rows, height), :] = values.min()
        placed[:, ~_is_seen(columns, width)] = values.min()
        return placed


def resize(values: FloatArray, height: int, width: int) -> FloatArray:
    """Returns a map (h, w) at another resolution, as float32 (height, width), both covering the same area."""
    if height < 1 or width < 1:
        raise ValueError(f"a map has at least one row and one column, not {height} and {width}")
    rows = (np.arange(height) + 0.5) * values.shape[0] / height - 0.5
    columns = (np.arange(width) + 0.5) * values.shape[1] / width - 0.5
    return interpolate(values, rows, columns)


def interpolate(values: FloatArray, rows: Coordinates, columns: Coordinates) -> FloatArray:
    """Reads a map between its cells.

    Args:
        values: (h, w).
        rows: (H,), in cells, 0 at the centre of the first row; clamped to [0, h - 1].
        columns: (W,), likewise.

    Returns:
        float32 (H, W), bilinear.
    """
    above, below, row_share = _neighbours(rows, values.shape[0])
    left, right, column_share = _neighbours(columns, values.shape[1])
    cells = values.astype(np.float64)
    # Adding a share of the difference, unlike a weighted sum, leaves a constant map exactly constant.
    wide = cells[:, left] + (cells[:, right] - cells[:, left]) * column_share
    # Only now does the array grow to the source's size; float32 halves what a large photograph takes.
    wide = wide.astype(np.float32)
    result = wide[below] - wide[above]
    result *= row_share.astype(np.float32)[:, None]
    result += wide[above]
    return np.asarray(result, np.float32)


def _neighbours(coordinates: Coordinates, size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Coordinates]:
    """Returns the cells on both sides of each coordinate and the second one's share."""
    clamped = np.clip(coordinates, 0, size - 1)
    first = np.floor(clamped).astype(np.intp)
    return first, np.minimum(first + 1, size - 1), clamped - first


def _is_seen(coordinates: Coordinates, size: int) -> npt.NDArray[np.bool_]:
    return np.asarray((coordinates >= -0.5) & (coordinates <= size - 0.5))

"""Boxes around the strongest evidence: a map arrives, its connected parts above a threshold leave, strongest first.

`encode.py` calls `find_regions` on the map as the engine left it, at the layer's resolution, so that the boxes do not depend on
how the map is sent. Pure numpy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from camserve.server.jobs import BoolArray, Box, FloatArray, Geometry, HeatRegion, RegionOptions
from camserve.server.placement import box_on_source

__all__ = ["find_regions"]

# Pixels; what rounding leaves of a part in the padding.
_HAIR = 1e-3

Labels = npt.NDArray[np.intp]


def find_regions(values: FloatArray, options: RegionOptions, geometry: Geometry | None) -> tuple[HeatRegion, ...]:
    """Finds the connected cells that reach a share of the map's largest value; cells that touch at a corner are connected.

    A box covers its cells whole, not from centre to centre, and so goes as far as a pixel can have been looked at. Parts that lie
    wholly in the padding around a letterboxed source have no box there and are left out.

    Args:
        values: (h w), finite.
        options: the threshold, above 0, and how many at most.
        geometry: how the model's input, which the map covers, lies on the source; None tells boxes in cells of the map.

    Returns:
        By peak, then share, then place from the top left; none for a map without positive values.
    """
    peak = float(values.max())
    if peak <= 0:
        return ()
    # In double: the threshold itself must not be lost to rounding.
    chosen = np.asarray(values.astype(np.float64) >= options.threshold * peak)
    rows, columns = np.nonzero(chosen)
    part = _parts(chosen)[rows, columns]
    count = int(part.max()) + 1
    strength = values[rows, columns].astype(np.float64)
    total = float(np.maximum(values, 0).sum(dtype=np.float64))
    peaks = np.full(count, -np.inf)
    np.maximum.at(peaks, part, strength)
    shares = np.bincount(part, strength, count) / total
    top, left = np.full(count, values.shape[0]), np.full(count, values.shape[1])
    bottom, right = np.zeros(count, np.intp), np.zeros(count, np.intp)
    np.minimum.at(top, part, rows)
    np.minimum.at(left, part, columns)
    np.maximum.at(bottom, part, rows + 1)
    np.maximum.at(right, part, columns + 1)
    found = []
    for place in np.lexsort((np.arange(count), -shares, -peaks)):
        cells = Box(
            float(left[place]),
            float(top[place]),
            float(right[place] - left[place]),
            float(bottom[place] - top[place]),
        )
        box = _on_source(cells, geometry, values.shape)
        if box.width > _HAIR and box.height > _HAIR:
            found.append(HeatRegion(box=box, peak=float(peaks[place]), share=min(float(shares[place]), 1.0)))
        if len(found) == options.max_regions:
            break
    return tuple(found)


def _on_source(cells: Box, geometry: Geometry | None, shape: tuple[int, ...]) -> Box:
    if geometry is None:
        return cells
    across, down = geometry.input_width / shape[1], geometry.input_height / shape[0]
    on_input = Box(cells.left * across, cells.top * down, cells.width * across, cells.height * down)
    return box_on_source(on_input, geometry)


def _parts(chosen: BoolArray) -> Labels:
    """Numbers the connected parts, (h w) from 0 in order of their first cell; -1 where nothing is chosen.

    Every chosen cell begins as its own part. Neighbours hand each other the lower number, and each number then stands for the
    lowest it leads to; the number of parts left to join falls by a factor in every round, whatever their form.
    """
    cells = np.arange(chosen.size).reshape(chosen.shape)
    joined = [
        (cells[here][chosen[here] & chosen[there]], cells[there][chosen[here] & chosen[there]])
        for here, there in _NEIGHBOURS
    ]
    one = np.concatenate([pair[0] for pair in joined])
    other = np.concatenate([pair[1] for pair in joined])
    lowest = np.arange(chosen.size)
    while True:
        first, second = lowest[one], lowest[other]
        apart = first != second
        if not apart.any():
            break
        one, other, first, second = one[apart], other[apart], first[apart], second[apart]
        np.minimum.at(lowest, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(lowest, further := lowest[lowest]):
            lowest = further
    result = np.full(chosen.shape, -1)
    _, numbered = np.unique(lowest[chosen.reshape(-1)], return_inverse=True)
    result[chosen] = numbered
    return result


_ALL, _BUT_LAST, _BUT_FIRST = slice(None), slice(None, -1), slice(1, None)
# Right, below, below right, below left: each pair of the eight neighbours once.
_NEIGHBOURS = (
    ((_ALL, _BUT_LAST), (_ALL, _BUT_FIRST)),
    ((_BUT_LAST, _ALL), (_BUT_FIRST, _ALL)),
    ((_BUT_LAST, _BUT_LAST), (_BUT_FIRST, _BUT_FIRST)),
    ((_BUT_LAST, _BUT_FIRST), (_BUT_FIRST, _BUT_LAST)),
)

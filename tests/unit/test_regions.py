"""Regions: boxes around what is strong and hangs together, worked out on paper and by the plainest possible search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from camserve.server.jobs import Box, Geometry, HeatRegion, RegionOptions
from camserve.server.regions import find_regions


def found(rows: list[list[float]], threshold: float = 0.5, most: int | None = None, geometry: Geometry | None = None):
    """The regions of a map."""
    options = RegionOptions(threshold=threshold, max_regions=most)
    return find_regions(np.array(rows, np.float32), options, geometry)


def test_parts_are_told_strongest_first_with_peak_and_share():
    """Positive values add up to 16; cells below half of 8 belong to none, negative ones to nothing."""
    rows = [
        [4, 0, 0, 1],
        [0, 0, -9, 0],
        [0, 0, 3, 8],
    ]

    assert (
        HeatRegion(box=Box(3.0, 2.0, 1.0, 1.0), peak=8.0, share=0.5),
        HeatRegion(box=Box(0.0, 0.0, 1.0, 1.0), peak=4.0, share=0.25),
    ) == found(rows)
    assert [HeatRegion(box=Box(3.0, 2.0, 1.0, 1.0), peak=8.0, share=0.5)] == list(found(rows, most=1))


def test_cells_that_touch_at_a_corner_belong_together():
    """Both diagonals; a gap of one cell parts them."""
    rows = [
        [2, 0, 0, 0, 2],
        [0, 2, 0, 0, 0],
        [2, 0, 0, 0, 2],
    ]

    assert [Box(0, 0, 2, 3), Box(4, 0, 1, 1), Box(4, 2, 1, 1)] == [region.box for region in found(rows)]


def test_of_equal_peaks_the_larger_share_comes_first():
    """Then the place, from the top left, so that the order never varies."""
    rows = [[2, 0, 2, 0, 2, 2]]

    assert [Box(4, 0, 2, 1), Box(0, 0, 1, 1), Box(2, 0, 1, 1)] == [region.box for region in found(rows)]


def test_a_part_may_wind():
    """A spiral is one part, and a long chain of parts is joined as well as a short one."""
    size = 41
    rows = np.zeros((size, size), np.float32)
    row, column, down, right = 0, 0, 0, 1
    rows[0, 0] = 1
    for length in [size - 1, *(side for side in range(size - 1, 0, -2) for _ in (0, 1))]:
        for _ in range(length):
            row, column = row + down, column + right
            rows[row, column] = 1
        down, right = right, -down

    (region,) = find_regions(rows, RegionOptions(threshold=1.0), None)

    assert (Box(0, 0, size, size), 1.0) == (region.box, region.share)


@pytest.mark.parametrize("rows", [[[0.0, 0.0]], [[-1.0, -2.0]]])
def test_a_map_without_positive_evidence_has_no_regions(rows):
    """A share of nothing is nothing."""
    assert () == found(rows)


def test_the_largest_value_always_reaches_the_threshold():
    """Also at 1, where rounding could lose it."""
    assert [Box(1, 0, 1, 1)] == [region.box for region in found([[0.1, 0.3]], threshold=1.0)]


def test_boxes_on_the_source_cover_their_cells_whole():
    """Four cells on an input of 8 pixels, each of which is 3 of the source's, of which the first 3 were cropped away."""
    geometry = Geometry(
        source_width=24, source_height=9, input_width=8, input_height=2, scale_x=3, scale_y=3, offset_x=4, offset_y=1
    )

    (region,) = found([[0, 1, 0, 0]], geometry=geometry)

    # Cell 1 is input pixels 2 and 3; the edge of the input is that of source column 3.
    assert Box(9.0, 0.0, 6.0, 6.0) == region.box


def test_what_lies_in_the_padding_has_no_box():
    """Of a part that reaches into it the rest is told."""
    geometry = Geometry(source_width=2, source_height=1, input_width=2, input_height=3, offset_y=-1)

    assert [Box(0.0, 0.0, 1.0, 1.0)] == [
        region.box for region in found([[1, 0], [1, 0], [0, 0]], geometry=geometry, most=1)
    ]
    assert [Box(1.0, 0.0, 1.0, 1.0)] == [
        region.box
        for region in found([[9, 0], [0, 0], [0, 9]], geometry=geometry)
        + found([[0, 0], [0, 9], [0, 0]], geometry=geometry)
    ]


_MAPS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])
)


def flooded(chosen: np.ndarray) -> list[frozenset[tuple[int, int]]]:
    """Parts by flooding from cell to cell."""
    left = {(int(row), int(column)) for row, column in np.argwhere(chosen)}
    parts = []
    while left:
        edge, part = [left.pop()], set()
        while edge:
            row, column = edge.pop()
            part.add((row, column))
            near = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
        parts.append(frozenset(part))
    return parts


@settings(max_examples=300, deadline=None, derandomize=True)
@given(values=_MAPS, threshold=st.sampled_from([0.25, 0.5, 1.0]))
def test_regions_are_what_flooding_finds(values, threshold):
    """The same parts, boxes, peaks and shares, for every small map."""
    peak = float(values.max())
    parts = flooded(values >= threshold * peak) if peak > 0 else []
    total = float(np.maximum(values, 0).sum())
    expected = []
    for part in parts:
        rows, columns = zip(*part, strict=True)
        box = Box(min(columns), min(rows), max(columns) + 1 - min(columns), max(rows) + 1 - min(rows))
        strengths = [float(values[cell]) for cell in part]
        expected.append((-max(strengths), -sum(strengths) / total, box))

    result = find_regions(values, RegionOptions(threshold=threshold), None)

    told = [(-region.peak, -region.share, region.box) for region in result]
    assert sorted(expected, key=repr) == sorted(told, key=repr)
    assert [item[:2] for item in told] == sorted(item[:2] for item in told)

"""Placement: what is chosen on the source is what is chosen on the model's input, and back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cards import spec

from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import (
    About,
    Box,
    ClassIndex,
    DetectionBox,
    Geometry,
    Mask,
    PlacedBox,
    PlacedRegion,
    Point,
    Polarity,
    Region,
    Target,
)
from camserve.server.placement import box_on_source, placed

SHAPE = (3, 4, 4)
# A source of 8 x 8 pixels, of which each pixel of the input shows 2 x 2.
HALF = Geometry(
    source_width=8, source_height=8, input_width=4, input_height=4, scale_x=2, scale_y=2, offset_x=0.5, offset_y=0.5
)
# Letterboxed: 8 columns and 4 rows lie in the middle two rows of the input.
PADDED = dataclasses.replace(HALF, source_height=4, offset_y=-1.5)
# Cropped: the input shows the middle 4 x 4 pixels of 8 x 8, each as it is.
CROPPED = dataclasses.replace(HALF, scale_x=1, scale_y=1, offset_x=2, offset_y=2)


def place(about: About, geometry: Geometry | None, shape: tuple[int, ...] = SHAPE) -> About:
    """What becomes of a target."""
    return placed(spec(target=Target(about=about)), geometry, shape).target.about


def cells(
    pixels: Box | Mask | Point, geometry: Geometry | None, shape: tuple[int, ...] = SHAPE
) -> list[tuple[int, ...]]:
    """The chosen cells."""
    result = place(Region(1, pixels), geometry, shape)
    assert isinstance(result, PlacedRegion)
    assert (1, shape[1:]) == (result.index, result.cells.shape)
    return [tuple(map(int, cell)) for cell in np.argwhere(result.cells)]


def refusal(about: About, geometry: Geometry | None, shape: tuple[int, ...] = SHAPE) -> InvalidRequest:
    """What a target is refused with."""
    with pytest.raises(InvalidRequest) as caught:
        place(about, geometry, shape)
    assert Reason.FIELD_INVALID == caught.value.reason
    return caught.value


def mask(height: int, width: int, *chosen: tuple[int, int]) -> Mask:
    """A mask of these pixels, (row, column)."""
    pixels = np.zeros((height, width), np.uint8)
    for row, column in chosen:
        pixels[row, column] = 9
    return Mask((height, width), pixels.tobytes())


@pytest.mark.parametrize(
    ("pixels", "geometry", "expected"),
    [
        (Box(2, 4, 4, 2), HALF, [(2, 1), (2, 2)]),
        (Box(2, 4, 1, 1), HALF, [(2, 1)]),
        (Box(-9, 6, 99, 99), HALF, [(3, 0), (3, 1), (3, 2), (3, 3)]),
        (Box(0, 0, 2, 2), PADDED, [(1, 0)]),
        (Box(0, -5, 2, 99), PADDED, [(1, 0), (2, 0)]),
        (Box(0, 0, 3, 4), CROPPED, [(0, 0), (1, 0)]),
        (Box(1, 2, 2, 1), None, [(2, 1), (2, 2)]),
        (Point(3.0, 4.9), HALF, [(2, 1)]),
        (Point(-0.5, -0.5), HALF, [(0, 0)]),
        (Point(0, 0), PADDED, [(1, 0)]),
        (Point(3, 2), None, [(2, 3)]),
        (mask(8, 8, (1, 1), (7, 7)), HALF, [(0, 0), (3, 3)]),
        (mask(8, 8, (0, 1), (7, 7)), HALF, [(3, 3)]),
        (mask(8, 8, (6, 6)), HALF, [(3, 3)]),
        (mask(4, 8, (0, 1), (1, 1)), PADDED, [(1, 0)]),
        (mask(8, 8, (0, 0), (3, 2), (5, 5)), CROPPED, [(1, 0), (3, 3)]),
        (mask(4, 4, (0, 3)), None, [(0, 3)]),
    ],
)
def test_regions_choose_the_cells_that_show_them(pixels, geometry, expected):
    """Whole, letterboxed, cropped, and a tensor's own; what is smaller than a cell still has one; padding is never chosen."""
    assert expected == cells(pixels, geometry)


@pytest.mark.parametrize(
    ("pixels", "geometry", "field"),
    [
        (Box(8, 0, 2, 2), HALF, "box"),
        (Box(0, -3, 2, 3), HALF, "box"),
        (Box(0, 0, 2, 2), CROPPED, "box"),
        (Box(0, 4, 8, 4), PADDED, "box"),
        (Point(8, 0), HALF, "point"),
        (Point(0, 4), PADDED, "point"),
        (Point(1, 3), CROPPED, "point"),
        (Point(0, 4), None, "point"),
        (mask(8, 8, (0, 0), (7, 7)), CROPPED, "mask"),
    ],
)
def test_what_the_model_did_not_see_is_refused(pixels, geometry, field):
    """The text tells what it saw."""
    error = refusal(Region(1, pixels), geometry)

    assert f"specs[0].target.region.{field}" == error.field
    assert "columns 2 to 6, rows 2 to 6" in error.message or geometry is not CROPPED


@pytest.mark.parametrize(
    ("sent", "geometry", "shape", "told"),
    [
        (mask(4, 8, (0, 0)), HALF, SHAPE, "is 4 x 8; the upright source is 8 x 8"),
        (mask(4, 8, (0, 0)), None, SHAPE, "is 4 x 8; the tensor is 4 x 4"),
        (mask(4, 8, (0, 0)), None, (3, 4, 8, 2), "is 4 x 8; the tensor is 4 x 8 x 2"),
    ],
)
def test_a_mask_has_the_size_of_the_source(sent, geometry, shape, told):
    """Stretching one would choose what was not meant."""
    error = refusal(Region(1, sent), geometry, shape)

    assert "specs[0].target.region.mask.shape" == error.field
    assert told in error.message


def test_volumes_are_chosen_by_masks():
    """Any number of axes; a box or a point has only two."""
    chosen = Mask((1, 2, 2), bytes([0, 0, 0, 1]))

    assert [(0, 1, 1)] == cells(chosen, None, (1, 1, 2, 2))
    assert "choose cells by a mask" in refusal(Region(1, Point(0, 0)), None, (1, 1, 2, 2)).message
    assert "choose cells by a mask" in refusal(DetectionBox(Box(0, 0, 1, 1)), None, (1, 9)).message


def test_a_region_without_pixels_leaves_the_cells_to_the_prediction():
    """None is not everything."""
    result = place(Region(2), HALF)

    assert isinstance(result, PlacedRegion)
    assert (2, None) == (result.index, result.cells)


def test_everything_else_about_a_spec_stays():
    """Only what lies on the source is changed, and what does not is given back as it is."""
    plain = spec(target=Target(about=ClassIndex(1)))
    asked = spec(3, target=Target(about=Region(1, Point(0, 0)), polarity=Polarity.AGAINST, output_path="out"))

    assert plain is placed(plain, HALF, SHAPE)
    result = placed(asked, HALF, SHAPE)
    assert asked == dataclasses.replace(result, target=dataclasses.replace(result.target, about=asked.target.about))


def test_a_detection_box_lies_on_the_input():
    """Edges go to edges; what the model did not see is cut off."""
    assert PlacedBox(Box(1.0, 2.0, 1.5, 1.0), 1, 0.25) == place(DetectionBox(Box(2, 4, 3, 2), 1, 0.25), HALF)
    assert PlacedBox(Box(0.0, 0.0, 2.0, 1.0)) == place(DetectionBox(Box(-1, 1, 5, 2)), CROPPED)
    assert PlacedBox(Box(1.0, 2.0, 3.0, 1.0)) == place(DetectionBox(Box(1, 2, 3, 1)), None)
    assert "specs[0].target.detection.box" == refusal(DetectionBox(Box(0, 0, 2, 2)), CROPPED).field


def test_a_box_of_the_input_lies_on_the_source():
    """And ends where the source does: nothing is found in the padding."""
    assert Box(2.0, 4.0, 3.0, 2.0) == box_on_source(Box(1.0, 2.0, 1.5, 1.0), HALF)
    assert Box(0.0, 0.0, 8.0, 4.0) == box_on_source(Box(0.0, 0.0, 4.0, 4.0), PADDED)
    assert Box(2.0, 0.0, 2.0, 0.0) == box_on_source(Box(1.0, 0.0, 1.0, 0.5), PADDED)
    assert Box(1.0, 2.0, 1.5, 1.0) == box_on_source(Box(1.0, 2.0, 1.5, 1.0), None)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    left=st.floats(0, 30),
    top=st.floats(0, 30),
    width=st.floats(0.5, 30),
    height=st.floats(0.5, 30),
    scale=st.floats(0.1, 10),
    offset=st.floats(-20, 20),
)
def test_there_and_back_a_box_is_the_same(left, top, width, height, scale, offset):
    """Whatever the geometry, as long as both sides hold it."""
    lies = Geometry(
        source_width=10_000,
        source_height=10_000,
        input_width=64,
        input_height=64,
        scale_x=scale,
        scale_y=scale,
        offset_x=offset + 100,
        offset_y=offset + 100,
    )
    box = Box(left, top, width, height)

    result = place(DetectionBox(box_on_source(box, lies)), lies)

    assert isinstance(result, PlacedBox)
    assert dataclasses.astuple(box) == pytest.approx(dataclasses.astuple(result.box), abs=1e-6)

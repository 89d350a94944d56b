"""Enlarging maps: what torch does, what paper and pencil say, and what pixels outside the model's view get."""

import numpy as np
import pytest
import torch

from camserve.server.jobs import Geometry
from camserve.server.resize import map_geometry, onto_source, resample, to_size


@pytest.mark.parametrize("cells", [(7, 7), (1, 1), (1, 5), (14, 3), (20, 31)])
@pytest.mark.parametrize("size", [(224, 224), (13, 57), (1, 1), (5, 2)])
def test_to_size_is_torchs_interpolate(cells: tuple[int, int], size: tuple[int, int]) -> None:
    """Half-pixel centres, clamped edges, no antialias: F.interpolate with align_corners=False."""
    values = np.random.default_rng(0).normal(size=cells).astype(np.float32)
    # In float64: torch's float32 kernel rounds the coordinates, too, which is off by 1e-5 in steep maps.
    batch = torch.from_numpy(values)[None, None].double()
    expected = torch.nn.functional.interpolate(batch, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()

    np.testing.assert_allclose(to_size(values, *size), expected, rtol=0, atol=1e-6)


def test_resample_reads_between_cells() -> None:
    """Values are linear between centres and clamped beyond them."""
    values = np.array([[0, 4], [8, 12]], np.float32)

    result = resample(values, np.array([-1.0, 0.5]), np.array([0.0, 0.25, 9.0]))

    assert [[0, 1, 4], [4, 5, 8]] == result.tolist()


def test_constant_maps_stay_constant() -> None:
    """Enlarging adds no rounding noise to a constant map."""
    constant = np.full((7, 7), 0.1, np.float32)

    assert {np.float32(0.1)} == set(np.unique(to_size(constant, 200, 333)))


def test_extreme_values_do_not_overflow() -> None:
    """Neighbours at both ends of float32's range still give finite values between them."""
    largest = np.finfo(np.float32).max
    values = np.array([[-largest, largest]], np.float32)

    assert [[-largest, 0, largest]] == resample(values, np.array([0.0]), np.array([0.0, 0.5, 1.0])).tolist()


def test_map_geometry_composes_cells_with_the_input() -> None:
    """Cell j's centre is input pixel (j + 0.5) * input / cells - 0.5, then the input's own geometry."""
    geometry = Geometry(
        source_width=500,
        source_height=400,
        input_width=224,
        input_height=112,
        scale_x=2,
        scale_y=3,
        offset_x=10,
        offset_y=-5,
    )

    cells = map_geometry(geometry, 7, 14)

    assert 2 * ((3 + 0.5) * 224 / 14 - 0.5) + 10 == cells.scale_x * 3 + cells.offset_x
    assert 3 * ((5 + 0.5) * 112 / 7 - 0.5) - 5 == cells.scale_y * 5 + cells.offset_y
    assert (14, 7, 500, 400) == (cells.input_width, cells.input_height, cells.source_width, cells.source_height)


def test_stretched_map_on_source_is_plain_resizing() -> None:
    """When the input is the whole source, drawing on the source is resizing to it."""
    values = np.random.default_rng(1).random((7, 5)).astype(np.float32)
    scale_x, scale_y = 301 / 224, 199 / 224
    geometry = Geometry(
        source_width=301,
        source_height=199,
        input_width=224,
        input_height=224,
        scale_x=scale_x,
        scale_y=scale_y,
        offset_x=0.5 * scale_x - 0.5,
        offset_y=0.5 * scale_y - 0.5,
    )

    np.testing.assert_allclose(onto_source(values, map_geometry(geometry, 7, 5)), to_size(values, 199, 301), atol=1e-6)


def test_unseen_pixels_get_the_smallest_value() -> None:
    """A crop's surroundings carry the map's smallest value; its edge cells reach half a cell outward."""
    geometry = Geometry(
        source_width=8, source_height=2, input_width=2, input_height=1, scale_x=2, scale_y=2, offset_x=2.5, offset_y=0.5
    )
    values = np.array([[1, 3]], np.float32)

    drawn = onto_source(values, geometry)

    # u = (x - 2.5) / 2 = -1.25 -0.75 | -0.25 0.25 0.75 1.25 | 1.75 2.25
    assert [[1, 1, 1, 1.5, 2.5, 3, 1, 1]] * 2 == drawn.tolist()


def test_a_map_that_lies_beside_the_source_draws_its_smallest_value() -> None:
    """Nothing seen is not an error: every pixel gets the smallest value."""
    geometry = Geometry(source_width=3, source_height=2, input_width=2, input_height=2, offset_x=50)

    drawn = onto_source(np.array([[5, 6], [7, 8]], np.float32), geometry)

    assert [[5.0] * 3] * 2 == drawn.tolist()


def test_large_maps_are_drawn_as_small_ones() -> None:
    """A result of many bands of rows is, to the last bit, what each row alone would be."""
    values = np.random.default_rng(2).normal(size=(7, 5)).astype(np.float32)
    rows, columns = np.linspace(-1, 8, 700), np.linspace(-1, 6, 901)

    result = resample(values, rows, columns)

    for row in (0, 144, 145, 146, 699):
        np.testing.assert_array_equal(result[row], resample(values, rows[row : row + 1], columns)[0])

import numpy as np
import pytest

from camserve.server.demo.pointing import TOLERANCE, chance, pointing_hit


def _mask(height: int = 224, width: int = 224, *, row: int = 100, column: int = 100) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[row, column] = True
    return mask


def _peak(height: int, width: int, row: int, column: int) -> np.ndarray:
    values = np.zeros((height, width), np.float32)
    values[row, column] = 1
    return values


def test_tolerance_is_fifteen_pixels_on_224() -> None:
    """On a 224 pixel picture a peak 15 pixels away hits and one 16 pixels away misses."""
    assert 15 == pytest.approx(TOLERANCE * 224)
    assert pointing_hit(_peak(224, 224, 100, 115), _mask())
    assert not pointing_hit(_peak(224, 224, 100, 116), _mask())


def test_tolerance_scales_with_the_shorter_side() -> None:
    """On a picture 448 pixels wide and 112 high the tolerance is that of 112: 7.5 pixels."""
    mask = _mask(112, 448, row=50, column=200)
    assert pointing_hit(_peak(112, 448, 57, 200), mask)
    assert not pointing_hit(_peak(112, 448, 58, 200), mask)


def test_a_coarse_map_points_with_its_cell_centres() -> None:
    """Of a 7 x 7 map on 224 pixels, cell (3, 3) points at pixel 111.5 and its neighbour at 143.5."""
    mask = _mask(row=108, column=108)
    assert pointing_hit(_peak(7, 7, 3, 3), mask)
    assert not pointing_hit(_peak(7, 7, 3, 4), mask)


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_a_map_without_a_peak_points_nowhere(value: float) -> None:
    """Constant and non-finite maps miss, even where everything is flawed."""
    assert not pointing_hit(np.full((7, 7), value), np.ones((224, 224), bool))


def test_one_bad_value_spoils_a_map() -> None:
    """A map with a NaN misses even if its highest finite cell would hit."""
    values = _peak(7, 7, 3, 3)
    values[0, 0] = np.nan
    assert not pointing_hit(values, _mask())


def test_an_empty_mask_is_refused() -> None:
    """A good surface has nothing to point at."""
    with pytest.raises(ValueError, match="mask is empty"):
        pointing_hit(np.eye(7), np.zeros((224, 224), bool))


def test_a_map_of_another_rank_is_refused() -> None:
    """A stack of maps is no map."""
    with pytest.raises(ValueError, match="shape"):
        pointing_hit(np.zeros((1, 7, 7)), _mask())


def test_chance_is_the_share_of_cells_that_hit() -> None:
    """Of 4 x 4 cells on 16 pixels, one pixel in a corner is reached by one."""
    assert 1 / 16 == chance(_mask(16, 16, row=1, column=1), cells=4)

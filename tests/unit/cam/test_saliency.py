import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camserve.server.cam.maps import finish_channels
from camserve.server.cam.saliency import reduce_channels
from camserve.server.jobs import MapFlag, Normalisation, Saliency

# Two channels over three cells.
VALUES = torch.tensor([[1.0, -2.0, 0.0], [-3.0, -1.0, 0.0]])
ARRAY = VALUES.numpy()


@pytest.mark.parametrize(
    ("saliency", "expected"),
    [
        (Saliency.COLOUR, [[1.0, -3.0], [-2.0, -1.0], [0.0, 0.0]]),
        (Saliency.POSITIVE, [1.0, 0.0, 0.0]),
        (Saliency.NEGATIVE, [3.0, 2.0, 0.0]),
        # Sums 4, 3, 0; the 99th percentile lies 98 % of the way from 3 to 4.
        (Saliency.GRAY, [3.98, 3.0, 0.0]),
    ],
)
def test_channels_worked_out_by_hand(saliency: Saliency, expected: list[object]) -> None:
    """Each reduction as its docstring says, in the map's own units."""
    torch.testing.assert_close(torch.tensor(expected), reduce_channels(VALUES, saliency))


@given(seed=st.integers(0, 2**31), height=st.integers(1, 20), width=st.integers(1, 20))
@settings(deadline=None, max_examples=50)
def test_gray_is_cut_off_at_numpys_percentile(seed: int, height: int, width: int) -> None:
    """As SmoothGrad's published visualisation limits its images."""
    values = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    magnitude = values.abs().sum(dim=0).numpy()

    result = reduce_channels(values, Saliency.GRAY)

    np.testing.assert_allclose(np.minimum(magnitude, np.percentile(magnitude, 99)), result.numpy())


def test_gray_keeps_what_is_rarer_than_its_percentile() -> None:
    """One cell in four hundred: cutting off at zero would leave nothing of it."""
    values = torch.zeros(3, 20, 20)
    values[1, 4, 5] = -2.0

    result = reduce_channels(values, Saliency.GRAY)

    assert 2.0 == float(result[4, 5])
    assert 1 == int(result.count_nonzero())


@pytest.mark.parametrize("saliency", Saliency)
@pytest.mark.parametrize("space", [(5,), (4, 5), (2, 3, 4)])
def test_curves_and_volumes_have_channels_too(saliency: Saliency, space: tuple[int, ...]) -> None:
    """Colours are the last axis; every other reduction leaves the space alone."""
    result = reduce_channels(torch.ones(3, *space), saliency)

    assert ((*space, 3) if saliency is Saliency.COLOUR else space) == result.shape


@pytest.mark.parametrize(
    ("values", "saliency", "flags"),
    [
        ([[1.0, -2.0]], Saliency.COLOUR, set()),
        ([[-1.0, -2.0]], Saliency.COLOUR, set()),
        ([[-1.0, -2.0]], Saliency.POSITIVE, {MapFlag.EMPTY}),
        ([[1.0, 2.0]], Saliency.NEGATIVE, {MapFlag.EMPTY}),
        ([[0.0, 0.0]], Saliency.GRAY, {MapFlag.EMPTY}),
        ([[3.0, -3.0]], Saliency.GRAY, {MapFlag.CONSTANT}),
        ([[3.0]], Saliency.COLOUR, {MapFlag.CONSTANT}),
        ([[math.nan, 1.0]], Saliency.COLOUR, {MapFlag.NON_FINITE}),
        ([[math.inf, math.nan]], Saliency.GRAY, {MapFlag.NON_FINITE, MapFlag.EMPTY}),
    ],
)
def test_what_a_reader_must_know_is_flagged(values: list[list[float]], saliency: Saliency, flags: set[MapFlag]) -> None:
    """Each singular map has a finite value and the flags that tell it apart; negative values are nothing to warn of."""
    finished = finish_channels(np.array(values, dtype=np.float32), saliency)

    assert flags == finished.flags
    assert np.isfinite(finished.values).all()


def test_a_broken_pixel_does_not_spread() -> None:
    """Zero takes its place before channels are added up and percentiles taken."""
    values = ARRAY.copy()
    values[0, 0] = math.nan

    finished = finish_channels(values, Saliency.NEGATIVE)

    assert [3.0, 2.0, 0.0] == finished.values.tolist()


def test_rectification_is_only_done_when_asked() -> None:
    """It drops negative values before channels are brought together."""
    signed = finish_channels(ARRAY, Saliency.COLOUR)
    rectified = finish_channels(ARRAY, Saliency.COLOUR, is_rectified=True)

    np.testing.assert_array_equal(ARRAY.T, signed.values)
    np.testing.assert_array_equal(np.maximum(ARRAY.T, 0), rectified.values)
    assert (-3.0, 1.0) == (signed.raw_min, signed.raw_max) == (rectified.raw_min, rectified.raw_max)


def test_colours_are_normalised_together() -> None:
    """One range for all channels, so that their balance stays; the raw range goes beside."""
    finished = finish_channels(ARRAY, Saliency.COLOUR, normalisation=Normalisation.MIN_MAX)

    assert [[1.0, 0.0], [0.25, 0.5], [0.75, 0.75]] == finished.values.tolist()
    assert (-3.0, 1.0) == (finished.raw_min, finished.raw_max)


def test_values_leave_as_float32() -> None:
    """Whatever they were computed in."""
    assert np.float32 == finish_channels(ARRAY.astype(np.float64), Saliency.GRAY).values.dtype

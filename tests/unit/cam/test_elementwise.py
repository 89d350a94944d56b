import numpy as np
import pytest
import skimage.measure
import skimage.transform
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evidence import layer_map, random_pair
from torch import Tensor

from camserve.server.cam.methods import Evidence
from camserve.server.cam.methods.elementwise import pool_windows
from camserve.server.jobs import Parameters

SEEDS = st.integers(0, 2**31)


def one_map(slug: str, activation: Tensor, gradient: Tensor) -> Tensor:
    """One method's map."""
    return layer_map(slug, Evidence(activation=activation, gradient=gradient))


@given(seed=SEEDS, height=st.integers(1, 7), width=st.integers(1, 7), window=st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_windows_hold_their_largest_value(seed: int, height: int, width: int, window: int) -> None:
    """Every cell has the maximum over its window, also where the layer's edge cuts windows short."""
    values = random_pair(seed, 1, 2, height, width)[1]
    expected = torch.empty_like(values)
    for top in range(0, height, window):
        for left in range(0, width, window):
            place = (..., slice(top, top + window), slice(left, left + window))
            expected[place] = values[place].amax(dim=(2, 3), keepdim=True)

    assert expected.equal(pool_windows(values, window))


def test_seg_xres_cam_with_windows_of_one_cell_is_hirescam() -> None:
    """The window is the caller's; two by default."""
    activation, gradient = random_pair(7, 1, 3, 5, 4)
    one, two, default = (
        layer_map("seg-xres-cam", Evidence(activation=activation, gradient=gradient, parameters=parameters))
        for parameters in (Parameters(window=1), Parameters(window=2), Parameters())
    )

    assert one_map("hirescam", activation, gradient).equal(one)
    assert default.equal(two)
    assert not one.equal(two)


@pytest.mark.parametrize("window", [2, 4])
def test_seg_xres_cam_is_what_its_authors_compute(window: int) -> None:
    """Against scikit-image's block_reduce and nearest resize, which their code calls."""
    activation, gradient = random_pair(9, 1, 3, 8, 4)
    pooled = skimage.measure.block_reduce(gradient[0].numpy(), (1, window, window), np.max)
    enlarged = skimage.transform.resize(pooled.transpose(1, 2, 0), (8, 4), order=0).transpose(2, 0, 1)
    expected = (enlarged * activation[0].numpy()).sum(axis=0)

    result = layer_map(
        "seg-xres-cam", Evidence(activation=activation, gradient=gradient, parameters=Parameters(window=window))
    )

    np.testing.assert_allclose(expected, result[0].numpy())

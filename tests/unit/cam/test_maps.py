import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchcam.methods import RefineCAM

from camserve.server.cam.maps import Array, finish, fuse, is_constant, normalise, rectify, resize
from camserve.server.errors import InvalidRequest
from camserve.server.jobs import Fusion, MapFlag, Normalisation, Profile

VALUES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=12)


def float32(values: list[float]) -> Array:
    """A raw map, in the dtype that most have."""
    return np.array(values, dtype=np.float32)


def one(values: list[float], *, is_rectified: bool = True, normalisation: Normalisation = Normalisation.NONE) -> Array:
    """The finished values of a single curve."""
    return finish([float32(values)], is_rectified=is_rectified, normalisation=normalisation).values


@pytest.mark.parametrize(
    ("values", "is_rectified", "flags", "expected"),
    [
        pytest.param([-1.0, 0.0, 2.0], True, set(), [0.0, 0.0, 2.0], id="plain"),
        pytest.param([-1.0, 0.0, 2.0], False, set(), [-1.0, 0.0, 2.0], id="signed"),
        pytest.param([0.0, 0.0], True, {MapFlag.EMPTY}, [0.0, 0.0], id="zero"),
        pytest.param([-1.0, -2.0], True, {MapFlag.EMPTY, MapFlag.NEGATIVE_ONLY}, [0.0, 0.0], id="negative"),
        pytest.param([-1.0, -2.0], False, {MapFlag.NEGATIVE_ONLY}, [-1.0, -2.0], id="negative signed"),
        pytest.param([-1.0, 0.0], True, {MapFlag.EMPTY, MapFlag.NEGATIVE_ONLY}, [0.0, 0.0], id="negative and zero"),
        pytest.param([3.0, 3.0], True, {MapFlag.CONSTANT}, [3.0, 3.0], id="constant"),
        pytest.param([3.0], True, {MapFlag.CONSTANT}, [3.0], id="one cell"),
        pytest.param([math.nan, 1.0], True, {MapFlag.NON_FINITE}, [0.0, 1.0], id="NaN"),
        pytest.param([-math.inf, 1.0], False, {MapFlag.NON_FINITE}, [0.0, 1.0], id="infinite"),
        pytest.param([math.nan, math.nan], True, {MapFlag.NON_FINITE, MapFlag.EMPTY}, [0.0, 0.0], id="all NaN"),
    ],
)
def test_what_a_reader_must_know_is_flagged(
    values: list[float],
    is_rectified: bool,  # noqa: FBT001 - a test parameter
    flags: set[MapFlag],
    expected: list[float],
) -> None:
    """Each singular map has a defined value and the flags that tell it apart."""
    finished = finish([float32(values)], is_rectified=is_rectified)

    assert flags == finished.flags
    assert expected == finished.values.tolist()


def test_the_raw_range_is_that_of_the_signed_map() -> None:
    """Rectification and normalisation do not touch it; negative evidence stays visible."""
    finished = finish([float32([-1.0, 4.0])], is_rectified=True, normalisation=Normalisation.MIN_MAX)

    assert (-1.0, 4.0) == (finished.raw_min, finished.raw_max)
    assert [0.0, 1.0] == finished.values.tolist()


def test_a_finished_map_owns_its_values() -> None:
    """A raw map may be a row of a whole batch's, which must not live as long as the row's answer does."""
    values = float32([-1.0, 2.0])

    for is_rectified in (True, False):
        assert not np.shares_memory(values, finish([values], is_rectified=is_rectified).values)


def test_values_beyond_float32_are_flagged() -> None:
    """A float64 map leaves as float32; what does not fit is not finite."""
    finished = finish([np.array([1e300, 1.0])], is_rectified=True)

    assert {MapFlag.NON_FINITE} == finished.flags
    assert [0.0, 1.0] == finished.values.tolist()


@given(values=VALUES, exponent=st.integers(-100, 100))
@settings(deadline=None, max_examples=100)
def test_normalisation_does_not_depend_on_scale(values: list[float], exponent: int) -> None:
    """Multiplying by a power of two changes no bit, down to the weakest targets: no constant sits in the denominator."""
    curve = np.array(values)

    np.testing.assert_array_equal(normalise(curve), normalise(curve * 2.0**exponent), strict=True)


@given(values=VALUES)
@settings(deadline=None, max_examples=100)
def test_normalisation_reaches_both_ends(values: list[float]) -> None:
    """A map that is not constant has a 0 and a 1 afterwards."""
    curve = float32(values)
    if not is_constant(curve):
        assert (0.0, 1.0) == (normalise(curve).min(), normalise(curve).max())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([2.0, 2.0], [1.0, 1.0], id="positive"),
        pytest.param([0.0, 0.0], [0.0, 0.0], id="zero"),
        pytest.param([-2.0, -2.0], [0.0, 0.0], id="negative"),
        pytest.param([1.0, 1.0 + 2e-7], [1.0, 1.0], id="constant but for rounding"),
        pytest.param([1e-45, 0.0], [1.0, 0.0], id="smallest number there is"),
        pytest.param([-3e38, 3e38], [0.0, 1.0], id="range overflows"),
    ],
)
def test_normalisation_is_defined_everywhere(values: list[float], expected: list[float]) -> None:
    """Constant maps, and ranges at either end of float32."""
    assert expected == one(values, is_rectified=False, normalisation=Normalisation.MIN_MAX).tolist()


@given(values=VALUES)
@settings(deadline=None, max_examples=50)
def test_rectification_keeps_what_is_positive(values: list[float]) -> None:
    """Nothing else changes."""
    assert [max(value, 0.0) for value in values] == rectify(float32(values)).tolist()


def test_resizing_is_centred_on_cells() -> None:
    """Doubling a curve puts new cells a quarter in from the old centres and repeats the edges."""
    assert [0.0, 1.0, 3.0, 4.0] == resize(float32([0.0, 4.0]), (4,)).tolist()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_is_resized_alike(axis: int) -> None:
    """A volume that varies along one axis is resized as the curve along it."""
    shape = [2, 2, 2]
    shape[axis] = 5
    curve = float32([0.0, 1.0, 5.0])
    volume = curve.reshape([3 if place == axis else 1 for place in range(3)])

    result = np.moveaxis(resize(volume, shape), axis, 0)

    expected = np.broadcast_to(resize(curve, (5,))[:, None, None], (5, 2, 2))
    np.testing.assert_allclose(expected, result, rtol=1e-6)


def test_resizing_to_the_same_shape_changes_no_bit() -> None:
    """There is nothing to interpolate."""
    values = np.random.default_rng(0).standard_normal((3, 4))

    np.testing.assert_array_equal(values, resize(values, (3, 4)))


@pytest.mark.parametrize("shape", [(4,), (4, 4, 4)])
def test_resizing_refuses_another_rank(shape: tuple[int, ...]) -> None:
    """An image does not become a volume."""
    with pytest.raises(ValueError, match="cannot be resized"):
        resize(np.zeros((2, 2)), shape)


def test_fusions_of_rectified_layers() -> None:
    """Each layer is min-max normalised first, so a hundred times stronger one has no louder voice."""
    maps = [float32([0.0, 1.0, 2.0]), float32([200.0, 0.0, 100.0])]
    expected = {Fusion.MEAN: [0.5, 0.25, 0.75], Fusion.MAX: [1.0, 0.5, 1.0], Fusion.PRODUCT: [0.0, 0.0, 0.5]}

    for fusion, values in expected.items():
        assert values == fuse(maps, fusion, is_rectified=True).tolist()


def test_layers_are_enlarged_to_the_finest() -> None:
    """A coarse layer is resized before it is normalised, so both reach their peak."""
    maps = [float32([0.0, 4.0]), float32([0.0, 0.0, 0.0, 1.0])]

    assert [0.0, 0.125, 0.375, 1.0] == fuse(maps, Fusion.MEAN, is_rectified=True).tolist()


def test_layercam_fusion_scales_the_shallow_layers() -> None:
    """tanh(2 M / max M) lifts the finer layer, the coarsest is left alone; torchcam scales both, and enlarges at last."""
    coarse, fine = float32([0.0, 4.0]), float32([0.5, 1.0, 0.0, 0.0])
    lifted, peak = math.tanh(1.0), math.tanh(2.0)

    paper = fuse([fine, coarse], Fusion.LAYERCAM, is_rectified=True)
    library = fuse([fine, coarse], Fusion.LAYERCAM, is_rectified=True, profile=Profile.TORCHCAM)

    np.testing.assert_allclose([lifted, peak, 0.75, 1.0], paper, rtol=1e-6)
    np.testing.assert_allclose([lifted, peak, 0.75 * peak, peak], library, rtol=1e-6)


def test_signed_layers_keep_their_zero() -> None:
    """Without rectification each layer is divided by its largest magnitude."""
    maps = [float32([-2.0, 1.0]), float32([5.0, 10.0])]

    assert [-0.25, 0.75] == fuse(maps, Fusion.MEAN, is_rectified=False).tolist()


@pytest.mark.parametrize("fusion", [Fusion.PRODUCT, Fusion.LAYERCAM])
def test_signed_layers_are_not_multiplied(fusion: Fusion) -> None:
    """Two negatives would make a positive."""
    with pytest.raises(InvalidRequest, match="needs rectified maps"):
        fuse([np.ones(2), np.ones(2)], fusion, is_rectified=False)


@pytest.mark.parametrize("fusion", Fusion)
def test_a_single_layer_is_not_fused(fusion: Fusion) -> None:
    """Its values keep their scale, whatever the fusion."""
    values = float32([-1.0, 5.0])

    np.testing.assert_array_equal(values, fuse([values], fusion, is_rectified=False))


def test_flags_of_several_layers() -> None:
    """One broken layer flags the map; negative-only needs all layers to be so."""
    broken = finish([float32([math.nan, 1.0]), float32([0.0, 1.0])], is_rectified=True)
    mixed = finish([float32([-1.0, -2.0]), float32([0.0, 1.0])], is_rectified=True)
    negative = finish([float32([-1.0, -2.0]), float32([-3.0, -1.0])], is_rectified=True)

    assert {MapFlag.NON_FINITE} == broken.flags
    assert not mixed.flags
    assert {MapFlag.NEGATIVE_ONLY, MapFlag.EMPTY} == negative.flags


@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_nothing_but_finite_values_leaves(values: list[float]) -> None:
    """Whatever comes in, values and raw range are finite, and normalised ones within 0 and 1."""
    for is_rectified in (True, False):
        finished = finish([float32(values)], is_rectified=is_rectified, normalisation=Normalisation.MIN_MAX)

        assert np.isfinite(finished.values).all()
        assert math.isfinite(finished.raw_min)
        assert math.isfinite(finished.raw_max)
        assert 0 <= float(finished.values.min()) <= float(finished.values.max()) <= 1


@pytest.mark.parametrize("shapes", [((3, 4), (6, 8), (12, 16)), ((5, 5), (7, 9)), ((2, 2, 3), (4, 4, 6))])
def test_products_are_torchcams_under_its_profile(shapes: tuple[tuple[int, ...], ...]) -> None:
    """RefineCAM there normalises each layer before it enlarges it; the paper's profile enlarges first, so that peaks stay 1."""
    generator = torch.Generator().manual_seed(2)
    layers = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected = RefineCAM.fuse_cams([layer[None] for layer in layers], normalized=False)[0]
    maps = [layer.numpy() for layer in layers]

    library = fuse(maps, Fusion.PRODUCT, is_rectified=True, profile=Profile.TORCHCAM)

    np.testing.assert_allclose(expected, library, rtol=1e-6, atol=1e-6)
    assert not np.allclose(library, fuse(maps, Fusion.PRODUCT, is_rectified=True), rtol=1e-2)

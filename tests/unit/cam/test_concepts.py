from __future__ import annotations

import math

import pytest
import torch
from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff
from support.scenes import Halves, ModelScene, finish, small_halves
from torch import Tensor, nn

from camserve.server.cam.methods.concepts import CONCEPTS
from camserve.server.cam.methods.method import Amplified
from camserve.server.errors import InvalidRequest
from camserve.server.jobs import Parameters, Profile

(METHOD,) = CONCEPTS


def scene_of(activation: Tensor, *, concepts: int | None = None, profile: Profile = Profile.PAPER) -> ModelScene:
    """A scene whose layer is the input itself, (c *space)."""
    model = Halves(nn.Identity(), nn.Identity())
    return ModelScene(model=model, inputs=activation[None], parameters=Parameters(concepts=concepts), profile=profile)


def maps_of(scene: ModelScene) -> Tensor:
    """The finished maps under the scene's profile."""
    arithmetic = METHOD.under(scene.profile)
    assert isinstance(arithmetic, Amplified)
    maps = finish(arithmetic.steps(scene))
    assert arithmetic.maps is not None
    assert arithmetic.maps(scene.parameters) == len(maps)
    return maps


def blocks() -> tuple[Tensor, Tensor]:
    """Three patterns of channels in three places that do not overlap: a factorisation that is unique."""
    generator = torch.Generator().manual_seed(0)
    places = torch.zeros(3, 6, 6, dtype=torch.float64)
    for index, strength in enumerate((3.0, 2.0, 1.0)):
        places[index, 2 * index : 2 * index + 2] = strength * (1 + torch.rand(2, 6, generator=generator))
    patterns = torch.rand(8, 3, generator=generator, dtype=torch.float64)
    # A channel that only one of them has, for each: without it other patterns would do as well.
    patterns[:3] = torch.eye(3)
    patterns = torch.nn.functional.normalize(patterns, dim=0)
    return torch.einsum("ck,khw->chw", patterns, places), places


def residual(activation: Tensor, maps: Tensor) -> float:
    """What the best patterns for these maps leave of the activation, relative."""
    cells, places = activation.flatten(1), maps.flatten(1).to(activation.dtype)
    patterns = torch.linalg.lstsq(places.T, cells.T).solution
    return float(torch.linalg.norm(cells - patterns.T @ places) / torch.linalg.norm(cells))


def test_patterns_that_do_not_overlap_are_found() -> None:
    """Each map is one of the places, the strongest first, in the activation's unit."""
    activation, places = blocks()

    torch.testing.assert_close(places.float(), maps_of(scene_of(activation, concepts=3)), rtol=1e-3, atol=1e-3)


def test_concepts_beyond_the_rank_are_maps_of_zeros() -> None:
    """Asking for more patterns than there are, or than there are cells, gives the rest empty."""
    activation, _ = blocks()
    cell = activation[:, :1, :1]

    maps = maps_of(scene_of(cell, concepts=4))

    assert [True, False, False, False] == [bool(values.any()) for values in maps]


@pytest.mark.parametrize("shape", [(8, 20), (8, 5, 7), (8, 3, 4, 5)])
def test_five_concepts_with_any_number_of_axes(shape: tuple[int, ...]) -> None:
    """Unless asked otherwise; every map is non-negative and finite at every step."""
    maps = maps_of(scene_of(torch.randn(shape, generator=torch.Generator().manual_seed(1))))

    assert (5, *shape[1:]) == tuple(maps.shape)
    assert float(maps.min()) >= 0


@pytest.mark.filterwarnings("ignore:Maximum number of iterations")
def test_it_fits_as_well_as_the_library() -> None:
    """What is left over is at most a hundredth more than sklearn leaves from its random start."""
    activation = small_halves(channels=24).front(torch.randn(1, 3, 64, 64, dtype=torch.float64)).detach()[0]
    _, expected = dff(activation[None].numpy().copy(), n_components=4)
    lifted = activation - activation.amin(dim=(1, 2), keepdim=True)

    maps = maps_of(scene_of(activation, concepts=4, profile=Profile.PYTORCH_GRAD_CAM))

    assert residual(lifted, maps) <= residual(lifted, torch.from_numpy(expected[0])) * 1.01


@pytest.mark.filterwarnings("ignore:Maximum number of iterations")
def test_the_library_agrees_where_the_factors_are_unique() -> None:
    """Each of its maps is one of ours but for its scale."""
    activation, _ = blocks()
    _, expected = dff(activation[None].numpy().copy(), n_components=3)
    ours = torch.nn.functional.normalize(
        maps_of(scene_of(activation, concepts=3, profile=Profile.PYTORCH_GRAD_CAM)).flatten(1).double()
    )
    theirs = torch.nn.functional.normalize(torch.from_numpy(expected[0]).flatten(1))

    assert float((ours @ theirs.T).amax(dim=1).min()) > 0.999


def test_more_steps_fit_better() -> None:
    """A partial result is a factorisation that the next steps improve."""
    activation = torch.rand(16, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    arithmetic = METHOD.arithmetic
    assert isinstance(arithmetic, Amplified)

    steps = list(arithmetic.steps(scene_of(activation)))

    assert len(steps) > 1
    assert residual(activation, steps[-1].best()) <= residual(activation, steps[0].best())


def test_negative_activations_are_no_concepts() -> None:
    """Rectified first: a layer with negative cells has the maps of its positive part."""
    activation, _ = blocks()
    mixed = torch.where(activation > 0, activation, -1.0)

    torch.testing.assert_close(maps_of(scene_of(activation, concepts=3)), maps_of(scene_of(mixed, concepts=3)))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_does_not_matter(scale: float) -> None:
    """Tiny and huge activations have the same maps in their own unit."""
    activation, _ = blocks()
    expected = maps_of(scene_of(activation, concepts=3))

    result = maps_of(scene_of(activation * scale, concepts=3))

    torch.testing.assert_close(expected, result / scale, rtol=1e-4, atol=1e-6)


def test_a_dead_layer_has_maps_of_zeros() -> None:
    """Nothing active, no concept."""
    assert not bool(maps_of(scene_of(torch.zeros(8, 4, 4))).any())


def test_nan_shows_in_every_map() -> None:
    """Activations that are not finite make no plausible map."""
    activation, _ = blocks()
    activation[0, 0, 0] = math.nan
    arithmetic = METHOD.arithmetic
    assert isinstance(arithmetic, Amplified)

    (step,) = arithmetic.steps(scene_of(activation))

    assert bool(step.best().isnan().all())


def test_no_concepts_are_refused() -> None:
    """Below one there is nothing to find."""
    with pytest.raises(InvalidRequest, match="concepts 0"):
        maps_of(scene_of(torch.ones(2, 2, 2), concepts=0))

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evidence import layer_map, random_pair
from torch import Tensor

from camserve.server.cam.methods import METHODS, Contrast, Evidence
from camserve.server.jobs import Fusion, Profile

SEEDS = st.integers(0, 2**31)
# Two channels on a 1 x 2 map: small enough to work out by hand.
ACTIVATION = torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]]])
GRADIENT = torch.tensor([[[[1.0, 3.0]], [[-1.0, 0.5]]]])


def one_map(slug: str, activation: Tensor, gradient: Tensor) -> Tensor:
    """One method's map."""
    return layer_map(slug, Evidence(activation=activation, gradient=gradient))


@given(seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_grad_cam_plus_plus_is_equation_19(seed: int) -> None:
    """The cancelled form equals alpha as printed."""
    activation, gradient = random_pair(seed, 2, 5, 3, 4)
    total = activation.sum(dim=(2, 3), keepdim=True)
    alpha = gradient**2 / (2 * gradient**2 + total * gradient**3)
    expected = ((alpha * gradient.clamp_min(0)).sum(dim=(2, 3), keepdim=True) * activation).sum(dim=1)

    result = one_map("grad-cam++", activation, gradient)

    torch.testing.assert_close(expected, result, rtol=1e-10, atol=1e-10)


def test_grad_cam_plus_plus_survives_gradients_whose_cube_underflows() -> None:
    """At g near 1e-20 the map is that of the limit, half the sum of ReLU(g) as weight, and not empty."""
    expected = (0.5 * GRADIENT.clamp_min(0).sum(dim=(2, 3), keepdim=True) * ACTIVATION).sum(dim=1)

    result = one_map("grad-cam++", ACTIVATION, GRADIENT * 1e-20)

    torch.testing.assert_close(expected, result * 1e20)


def test_grad_cam_plus_plus_is_defined_where_its_denominator_vanishes() -> None:
    """With sum A = -2 and g = 1 the coefficient has no value, and the cell counts for nothing."""
    activation = torch.tensor([[[-3.0, 1.0]]])

    result = one_map("grad-cam++", activation, torch.tensor([[[1.0, 0.0]]]))

    assert [[0.0, 0.0]] == result.tolist()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_xgrad_cam_falls_back_to_the_mean_gradient_where_activations_cancel(scale: float) -> None:
    """A channel that sums to zero keeps a finite weight at any scale: its mean gradient."""
    activation = torch.tensor([[[1.0, -1.0]]]) * scale
    gradient = torch.tensor([[[3.0, 5.0]]])

    result = one_map("xgrad-cam", activation, gradient)

    torch.testing.assert_close(4 * activation[:, 0], result)


def torchcam_plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    """As torchcam 0.5 computes it."""
    return ((gradient.clamp_min(0) ** 3).sum(dim=(2, 3), keepdim=True) * activation).sum(dim=1)


def grad_cam_library_plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    """As pytorch-grad-cam 1.5 computes it."""
    total = activation.sum(dim=(2, 3), keepdim=True)
    alpha = gradient**2 / (2 * gradient**2 + total * gradient**3 + 1e-6)
    return ((alpha * gradient.clamp_min(0)).sum(dim=(2, 3), keepdim=True) * activation).sum(dim=1)


@pytest.mark.parametrize(
    ("profile", "formula"),
    [(Profile.TORCHCAM, torchcam_plus_plus), (Profile.PYTORCH_GRAD_CAM, grad_cam_library_plus_plus)],
)
def test_profiles_follow_their_library(profile: Profile, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Grad-CAM++ differs between the paper and both libraries; a profile gives that library's numbers."""
    activation, gradient = random_pair(8, 2, 5, 3, 4)
    gradient = gradient * 1e-3

    result = layer_map("grad-cam++", Evidence(activation=activation, gradient=gradient), profile)

    torch.testing.assert_close(formula(activation, gradient), result, rtol=1e-9, atol=0)


def test_finer_cam_contrasts_with_the_nearest_classes() -> None:
    """Three classes at 0.6, as torchcam; pytorch-grad-cam takes them whole and weighs them by probability."""
    contrast = METHODS["finer-cam"].contrast
    assert contrast is not None

    assert Contrast(classes=3, weight=0.6) == contrast[Profile.PAPER] == contrast[Profile.TORCHCAM]
    assert Contrast(classes=3, weight=1.0, by_probability=True) == contrast[Profile.PYTORCH_GRAD_CAM]


def test_finer_cam_is_the_mean_of_contrasts() -> None:
    """By linearity: the map of the mean contrast is the mean of the maps of y_c - 0.6 y_d."""
    activation, target = random_pair(1, 1, 4, 3, 3)
    others = [random_pair(seed, 1, 4, 3, 3)[1] for seed in (2, 3, 4)]
    apart = [one_map("finer-cam", activation, target - 0.6 * other) for other in others]

    together = one_map("finer-cam", activation, target - 0.6 * torch.stack(others).mean(dim=0))

    torch.testing.assert_close(torch.stack(apart).mean(dim=0), together)


def test_refine_cam_is_grad_cam_plus_plus_multiplied_over_layers() -> None:
    """Under every profile it refines that profile's Grad-CAM++, and no spec changes its fusion."""
    activation, gradient = random_pair(4, 2, 3, 4, 4)
    evidence = Evidence(activation=activation, gradient=gradient)

    assert METHODS["refine-cam"].fusion is Fusion.PRODUCT
    for profile in Profile:
        assert layer_map("grad-cam++", evidence, profile).equal(layer_map("refine-cam", evidence, profile))


def test_shapley_cam_takes_half_the_curvature_away() -> None:
    """Mean gradients 2 and -1/4; mean curvatures 2 and 1 take 1 and 1/2 of them."""
    curvature = torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])

    result = layer_map("shapley-cam", Evidence(activation=ACTIVATION, gradient=GRADIENT, curvature=curvature))

    assert [[[1.0 - 0.75 * 2, 3.0 - 0.75 * 2]]] == result.tolist()


def test_shapley_cam_of_a_quadratic_score() -> None:
    """For y = sum A^2 / 2, g = A and H A = A: half of Grad-CAM, and the product of autograd agrees."""
    activation, _ = random_pair(6, 2, 3, 2, 2)
    activation.requires_grad_()
    (gradient,) = torch.autograd.grad((activation**2).sum() / 2, activation, create_graph=True)
    (curvature,) = torch.autograd.grad((gradient * activation.detach()).sum(), activation)

    result = layer_map(
        "shapley-cam", Evidence(activation=activation.detach(), gradient=gradient.detach(), curvature=curvature)
    )

    torch.testing.assert_close(one_map("grad-cam", activation.detach(), gradient.detach()) / 2, result)

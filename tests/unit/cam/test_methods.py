from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from camserve.server.cam.methods import METHODS, Need, WorkClass, find_method
from camserve.server.errors import Reason, Unsupported
from camserve.server.jobs import Profile

GRADIENT_METHODS = [slug for slug, method in METHODS.items() if Need.GRADIENT in method.needs]
SEEDS = st.integers(0, 2**31)
# Two channels on a 1 x 2 map: small enough to work out by hand.
ACTIVATION = torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]]])
GRADIENT = torch.tensor([[[[1.0, 3.0]], [[-1.0, 0.5]]]])


def random_pair(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An activation as a ReLU leaves it, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(shape, generator=generator, dtype=torch.float64).clamp_min(0)
    return activation.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def every_map(activation: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Every method on the same input; the gradient's first cells stand in for a head."""
    weight = gradient.flatten(2)[:, :, 0]
    return {slug: method.compute(activation, gradient, weight) for slug, method in METHODS.items()}


@pytest.mark.parametrize(
    ("slug", "expected"),
    [
        # Mean gradients 2 and -1/4.
        ("grad-cam", [[1.5, 5.5]]),
        ("hirescam", [[-1.0, 10.0]]),
        ("layercam", [[1.0, 10.0]]),
        # Weights 10/4 and -1/4: gradients averaged with the activation as weight.
        ("xgrad-cam", [[2.0, 7.0]]),
        # Weights 1/6 + 3/14 and 1/8: the denominators are 2 + 4 g, and negative gradients do not count.
        ("grad-cam++", [[1 / 6 + 3 / 14 + 2 / 8, 3 * (1 / 6 + 3 / 14) + 2 / 8]]),
        ("cam", [[-3.0, -1.0]]),
    ],
)
def test_maps_worked_out_by_hand(slug: str, expected: list[list[float]]) -> None:
    """Each method gives what its paper's formula gives on paper."""
    result = METHODS[slug].compute(ACTIVATION, GRADIENT, torch.tensor([[1.0, -2.0]]))

    torch.testing.assert_close(torch.tensor([expected]), result, rtol=1e-6, atol=1e-6)


@given(seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_grad_cam_plus_plus_is_equation_19(seed: int) -> None:
    """The cancelled form equals alpha as printed."""
    activation, gradient = random_pair(seed, 2, 5, 3, 4)
    total = activation.sum(dim=(2, 3), keepdim=True)
    alpha = gradient**2 / (2 * gradient**2 + total * gradient**3)
    expected = ((alpha * gradient.clamp_min(0)).sum(dim=(2, 3), keepdim=True) * activation).sum(dim=1)

    result = METHODS["grad-cam++"].compute(activation, gradient, None)

    torch.testing.assert_close(expected, result, rtol=1e-10, atol=1e-10)


def test_grad_cam_plus_plus_survives_gradients_whose_cube_underflows() -> None:
    """At g near 1e-20 the map is that of the limit, half the sum of ReLU(g) as weight, and not empty."""
    expected = (0.5 * GRADIENT.clamp_min(0).sum(dim=(2, 3), keepdim=True) * ACTIVATION).sum(dim=1)

    result = METHODS["grad-cam++"].compute(ACTIVATION, GRADIENT * 1e-20, None)

    torch.testing.assert_close(expected, result * 1e20)


def test_grad_cam_plus_plus_is_defined_where_its_denominator_vanishes() -> None:
    """With sum A = -2 and g = 1 the coefficient has no value, and the cell counts for nothing."""
    activation = torch.tensor([[[-3.0, 1.0]]])

    result = METHODS["grad-cam++"].compute(activation, torch.tensor([[[1.0, 0.0]]]), None)

    assert [[0.0, 0.0]] == result.tolist()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_xgrad_cam_falls_back_to_the_mean_gradient_where_activations_cancel(scale: float) -> None:
    """A channel that sums to zero keeps a finite weight at any scale: its mean gradient."""
    activation = torch.tensor([[[1.0, -1.0]]]) * scale
    gradient = torch.tensor([[[3.0, 5.0]]])

    result = METHODS["xgrad-cam"].compute(activation, gradient, None)

    torch.testing.assert_close(4 * activation[:, 0], result)


@pytest.mark.parametrize("slug", GRADIENT_METHODS)
def test_no_gradient_gives_an_empty_map(slug: str) -> None:
    """Where nothing influences the score, every gradient method gives zero, also for dead and negative channels."""
    activation = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]], [[-1.0, -2.0]], [[1.0, -1.0]]]])

    result = METHODS[slug].compute(activation, torch.zeros_like(activation), None)

    assert [[[0.0, 0.0]]] == result.tolist()


@pytest.mark.parametrize("slug", METHODS)
def test_signed_activations_never_make_nan(slug: str) -> None:
    """Taps behind batch norm or GELU have negative values and sums of either sign; maps stay finite."""
    for seed in range(50):
        activation, gradient = random_pair(seed, 2, 6, 3, 3, dtype=torch.float32)

        assert every_map(activation - activation.mean(), gradient)[slug].isfinite().all()


@given(seed=SEEDS, height=st.integers(1, 5), width=st.integers(1, 5), channels=st.integers(1, 8))
@settings(deadline=None, max_examples=50)
def test_average_pooling_and_a_linear_head_make_the_methods_agree(
    seed: int, height: int, width: int, channels: int
) -> None:
    """There, Grad-CAM = HiResCAM = XGrad-CAM, times the number of cells it is CAM, and its sum is the logit without bias."""
    activation, _ = random_pair(seed, 2, channels, height, width)
    activation.requires_grad_()
    weight = torch.randn(2, channels, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    logits = (activation.mean(dim=(2, 3)) * weight).sum(dim=1)
    (gradient,) = torch.autograd.grad(logits.sum(), activation)
    maps = {
        slug: METHODS[slug].compute(activation.detach(), gradient, weight)
        for slug in ("cam", "grad-cam", "hirescam", "xgrad-cam")
    }

    torch.testing.assert_close(maps["cam"], maps["grad-cam"] * height * width, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(maps["grad-cam"], maps["hirescam"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(maps["grad-cam"], maps["xgrad-cam"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits.detach(), maps["hirescam"].sum(dim=(1, 2)), rtol=1e-9, atol=1e-12)


@given(seed=SEEDS)
@settings(deadline=None, max_examples=50)
def test_layercam_is_at_least_hirescam_where_activations_are_not_negative(seed: int) -> None:
    """Dropping negative gradients can only add evidence there."""
    activation, gradient = random_pair(seed, 1, 4, 3, 5)

    layercam, hirescam = (METHODS[slug].compute(activation, gradient, None) for slug in ("layercam", "hirescam"))

    assert (layercam >= hirescam - 1e-12).all()


@given(seed=SEEDS, length=st.integers(1, 7))
@settings(deadline=None, max_examples=50)
def test_curves_and_volumes_are_images_with_axes_of_one(seed: int, length: int) -> None:
    """1D and 3D maps equal the 2D map of the same values."""
    activation, gradient = random_pair(seed, 2, 3, length)
    curves = every_map(activation, gradient)
    images = every_map(activation[:, :, None], gradient[:, :, None])
    volumes = every_map(activation[:, :, None, :, None], gradient[:, :, None, :, None])

    for slug, curve in curves.items():
        torch.testing.assert_close(curve, images[slug][:, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(curve, volumes[slug][:, 0, :, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slug", METHODS)
def test_half_inputs_have_float32_statistics(slug: str, half: torch.dtype) -> None:
    """A half map has exactly the bits of the same values in float32."""
    activation, gradient = random_pair(3, 2, 64, 7, 7, dtype=half)

    result = every_map(activation, gradient)[slug]

    assert torch.float32 == result.dtype
    assert every_map(activation.float(), gradient.float())[slug].equal(result)


@pytest.mark.parametrize("slug", METHODS)
def test_float64_stays(slug: str) -> None:
    """Double precision is not thrown away, and a batch agrees with its rows to 1e-9."""
    activation, gradient = random_pair(5, 3, 8, 4, 5)
    together = every_map(activation, gradient)[slug]
    alone = torch.cat([every_map(activation[row, None], gradient[row, None])[slug] for row in range(3)])

    assert torch.float64 == together.dtype
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9 * float(together.abs().max()))


@given(seed=SEEDS, height=st.integers(1, 5), width=st.integers(1, 5), channels=st.integers(1, 12))
@settings(deadline=None, max_examples=100)
def test_eigen_cam_is_the_first_component_of_the_decomposition(
    seed: int, height: int, width: int, channels: int
) -> None:
    """Whichever Gram matrix is smaller, the map is u1 * s1 of the centred matrix, up to the sign that we define."""
    activation, _ = random_pair(seed, 1, channels, height, width)
    cells = activation[0].flatten(1).T
    left, values, _ = torch.linalg.svd(cells - cells.mean(dim=0), full_matrices=False)
    first = left[:, 0] * values[0]

    result = METHODS["eigen-cam"].compute(activation, None, None).flatten()

    agreement = float((result * (cells.mean(dim=1) - cells.mean())).sum())
    assert agreement >= -1e-9 * float(values[0])
    if len(values) > 1 and values[1] > 0.95 * values[0]:
        return  # Nearly equal components: any mixture of them is as good a first one.
    torch.testing.assert_close(first.abs(), result.abs(), rtol=0, atol=1e-6 * float(values[0]) + 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_eigen_cam_scales_with_the_activation(scale: float) -> None:
    """Tiny and huge activations neither vanish nor overflow when they are squared."""
    activation = random_pair(1, 1, 5, 3, 3)[0].float()
    expected = METHODS["eigen-cam"].compute(activation, None, None)

    result = METHODS["eigen-cam"].compute(activation * scale, None, None)

    torch.testing.assert_close(expected, result / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("invert", [1.0, -1.0])
def test_eigen_cam_is_positive_where_the_activation_is_high(invert: float) -> None:
    """A bright blob is positive although the component alone has no sign; on a dark blob it is the surroundings."""
    blob = torch.zeros(1, 4, 5, 5)
    blob[:, :, 1:3, 1:3] = torch.tensor([1.0, 2.0, 0.5, 3.0])[None, :, None, None]

    result = METHODS["eigen-cam"].compute(invert * blob, None, None)

    assert (blob[:, 0] > 0).equal(invert * result > 0)


def test_eigen_cam_keeps_a_broken_row_to_itself() -> None:
    """NaN in one row makes that row's map NaN and leaves the bits of the others alone."""
    activation = random_pair(2, 3, 4, 3, 3)[0]
    expected = METHODS["eigen-cam"].compute(activation, None, None)
    activation[1, 2, 0, 0] = torch.nan

    result = METHODS["eigen-cam"].compute(activation, None, None)

    assert result[1].isnan().all()
    assert expected[[0, 2]].equal(result[[0, 2]])


@pytest.mark.parametrize("slug", GRADIENT_METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_hidden(slug: str, bad: float) -> None:
    """A broken activation shows in the map, where it can be flagged."""
    activation = ACTIVATION.clone()
    activation[0, 0, 0, 0] = bad

    assert not METHODS[slug].compute(activation, GRADIENT, None).isfinite().all()


@pytest.mark.parametrize("text", ["grad-cam++", "Grad-CAM++", "gradcam++", "GRAD_CAM++", "grad cam ++"])
def test_methods_are_found_however_they_are_written(text: str) -> None:
    """Hyphens, underscores, spaces and case do not matter."""
    assert METHODS["grad-cam++"] is find_method(text)


def test_unknown_methods_are_refused_with_a_suggestion() -> None:
    """The refusal names the nearest method and all that exist."""
    with pytest.raises(Unsupported, match=r"did you mean 'layercam'\?.*grad-cam\+\+") as refusal:
        find_method("layer-cams")

    assert Reason.METHOD_NOT_IMPLEMENTED == refusal.value.reason


def test_the_table_is_consistent() -> None:
    """Keys are slugs, every method cites a paper, and only gradients take the work class of a gradient."""
    for slug, method in METHODS.items():
        assert slug == method.slug
        assert "arXiv:" in method.paper or "doi:" in method.paper
        assert (Need.GRADIENT in method.needs) == (method.work is WorkClass.ONE_GRADIENT)


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

    result = METHODS["grad-cam++"].under(profile)(activation, gradient, None)

    torch.testing.assert_close(formula(activation, gradient), result, rtol=1e-9, atol=0)


def test_a_profile_refuses_what_its_library_does_not_have() -> None:
    """There is no HiResCAM in torchcam, and a paper's map must not be passed off as torchcam's."""
    with pytest.raises(Unsupported, match="use profile 'paper'"):
        METHODS["hirescam"].under(Profile.TORCHCAM)

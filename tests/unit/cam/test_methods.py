import dataclasses
from collections.abc import Iterable

import pytest
import pytorch_grad_cam
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evidence import LAYERWISE, evidence_of, layer_map, random_pair
from torch import Tensor

from camserve.server.cam.methods import METHODS, Evidence, Family, Need, Reads, WorkClass, find_method
from camserve.server.errors import Reason, Unsupported
from camserve.server.jobs import Parameters, Profile

GRADIENT_METHODS = [slug for slug in LAYERWISE if Need.GRADIENT in METHODS[slug].needs]
SEEDS = st.integers(0, 2**31)
# Two channels on a 1 x 2 map: small enough to work out by hand.
ACTIVATION = torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]]])
GRADIENT = torch.tensor([[[[1.0, 3.0]], [[-1.0, 0.5]]]])


def every_map(activation: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Every method that looks at layers one by one, on the same evidence."""
    evidence = evidence_of(activation, gradient)
    return {slug: layer_map(slug, evidence) for slug in LAYERWISE}


def maps(slugs: Iterable[str], activation: Tensor, gradient: Tensor, weight: Tensor | None = None) -> list[Tensor]:
    """Those methods' maps."""
    evidence = Evidence(
        activation=activation, gradient=gradient, class_weight=weight, curvature=torch.zeros_like(gradient)
    )
    return [layer_map(slug, evidence) for slug in slugs]


def one_map(slug: str, activation: Tensor, gradient: Tensor | None = None) -> Tensor:
    """One method's map; without a gradient for methods that need none."""
    return layer_map(slug, Evidence(activation=activation, gradient=gradient, curvature=gradient))


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
        ("finer-cam", [[1.5, 5.5]]),
        ("shapley-cam", [[1.5, 5.5]]),
        ("grad-cam-elementwise", [[1.0, 10.0]]),
        # One window holds both cells: largest gradients 3 and 1/2.
        ("seg-xres-cam", [[4.0, 10.0]]),
        # |g| A is (1, 9) and (2, 1): centred (-4, 4) and (1/2, -1/2), along (8, -1) / sqrt(65).
        ("seg-eigen-cam", [[-(65**0.5) / 2, 65**0.5 / 2]]),
    ],
)
def test_maps_worked_out_by_hand(slug: str, expected: list[list[float]]) -> None:
    """Each method gives what its paper's formula gives on paper."""
    (result,) = maps([slug], ACTIVATION, GRADIENT, torch.tensor([[1.0, -2.0]]))

    torch.testing.assert_close(torch.tensor([expected]), result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slug", GRADIENT_METHODS)
def test_no_gradient_gives_an_empty_map(slug: str) -> None:
    """Where nothing influences the score, every gradient method gives zero, also for dead and negative channels."""
    activation = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]], [[-1.0, -2.0]], [[1.0, -1.0]]]])

    result = one_map(slug, activation, torch.zeros_like(activation))

    assert [[[0.0, 0.0]]] == result.tolist()


@pytest.mark.parametrize("slug", LAYERWISE)
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
    """There all of them are Grad-CAM; times the number of cells it is CAM, and its sum is the logit without bias."""
    activation, _ = random_pair(seed, 2, channels, height, width)
    activation.requires_grad_()
    weight = torch.randn(2, channels, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    logits = (activation.mean(dim=(2, 3)) * weight).sum(dim=1)
    (gradient,) = torch.autograd.grad(logits.sum(), activation)
    cam, grad_cam, *others = maps(
        ["cam", "grad-cam", "hirescam", "xgrad-cam", "shapley-cam", "seg-xres-cam"],
        activation.detach(),
        gradient,
        weight,
    )

    torch.testing.assert_close(cam, grad_cam * height * width, rtol=1e-9, atol=1e-12)
    for other in others:
        torch.testing.assert_close(grad_cam, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits.detach(), grad_cam.sum(dim=(1, 2)), rtol=1e-9, atol=1e-12)


@given(seed=SEEDS)
@settings(deadline=None, max_examples=50)
def test_layercam_is_at_least_hirescam_where_activations_are_not_negative(seed: int) -> None:
    """Dropping negative gradients can only add evidence there; rectifying the product is then the same."""
    activation, gradient = random_pair(seed, 1, 4, 3, 5)

    layercam, hirescam = (one_map(slug, activation, gradient) for slug in ("layercam", "hirescam"))

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
@pytest.mark.parametrize("slug", LAYERWISE)
def test_half_inputs_have_float32_statistics(slug: str, half: torch.dtype) -> None:
    """A half map has exactly the bits of the same values in float32."""
    activation, gradient = random_pair(3, 2, 64, 7, 7, dtype=half)

    result = every_map(activation, gradient)[slug]

    assert torch.float32 == result.dtype
    assert every_map(activation.float(), gradient.float())[slug].equal(result)


@pytest.mark.parametrize("slug", LAYERWISE)
def test_float64_stays(slug: str) -> None:
    """Double precision is not thrown away, and a batch agrees with its rows to 1e-9."""
    activation, gradient = random_pair(5, 3, 8, 4, 5)
    together = every_map(activation, gradient)[slug]
    alone = torch.cat([every_map(activation[row, None], gradient[row, None])[slug] for row in range(3)])

    assert torch.float64 == together.dtype
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9 * float(together.abs().max()))


@pytest.mark.parametrize("slug", GRADIENT_METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_hidden(slug: str, bad: float) -> None:
    """A broken activation shows in the map, where it can be flagged."""
    activation = ACTIVATION.clone()
    activation[0, 0, 0, 0] = bad

    assert not one_map(slug, activation, GRADIENT).isfinite().all()


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
    """Keys are slugs, every method cites a paper, and the work class is that of the gradients it takes."""
    for slug, method in METHODS.items():
        assert slug == method.slug
        assert "arXiv:" in method.paper or "doi:" in method.paper
        assert (bool(method.needs - {Need.LINEAR_HEAD}), method.work) in {
            (True, WorkClass.ONE_GRADIENT),
            (False, WorkClass.FORWARD_ONLY),
            (True, WorkClass.AMPLIFIED),
            (False, WorkClass.AMPLIFIED),
        }
        assert method.has_target or not method.needs
        assert method.parameters <= {field.name for field in dataclasses.fields(Parameters)}
        assert not set(method.variants) & method.absent_from


def test_methods_that_look_elsewhere_name_no_layers() -> None:
    """Only methods at layers are drawn layer by layer."""
    assert all(METHODS[slug].reads is Reads.LAYERS for slug in LAYERWISE)


def test_a_profile_refuses_what_its_library_does_not_have() -> None:
    """There is no HiResCAM in torchcam, and a paper's map must not be passed off as torchcam's."""
    with pytest.raises(Unsupported, match="use profile 'paper'"):
        METHODS["hirescam"].under(Profile.TORCHCAM)


@pytest.mark.parametrize(
    ("slug", "library"),
    [
        ("grad-cam", pytorch_grad_cam.GradCAM),
        ("grad-cam++", pytorch_grad_cam.GradCAMPlusPlus),
        ("xgrad-cam", pytorch_grad_cam.XGradCAM),
        ("hirescam", pytorch_grad_cam.HiResCAM),
        ("layercam", pytorch_grad_cam.LayerCAM),
        ("grad-cam-elementwise", pytorch_grad_cam.GradCAMElementWise),
        ("fem", pytorch_grad_cam.FEM),
        ("eigen-cam", pytorch_grad_cam.EigenCAM),
        ("eigen-grad-cam", pytorch_grad_cam.EigenGradCAM),
        ("seg-eigen-cam", pytorch_grad_cam.SegEigenCAM),
        ("kpca-cam", pytorch_grad_cam.KPCA_CAM),
    ],
)
def test_arithmetic_is_that_of_pytorch_grad_cam(slug: str, library: type[pytorch_grad_cam.base_cam.BaseCAM]) -> None:
    """Its own function on the same arrays, under its profile; components but for their sign."""
    activation, gradient = random_pair(12, 2, 6, 5, 4)
    cam = library(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), [])
    expected = cam.get_cam_image(None, None, None, activation.numpy(), gradient.numpy(), eigen_smooth=False)
    expected = torch.from_numpy(expected)

    result = layer_map(slug, Evidence(activation=activation, gradient=gradient), Profile.PYTORCH_GRAD_CAM)

    if METHODS[slug].family is Family.COMPONENTS and slug not in {"fem", "seg-eigen-cam"}:
        expected, result = expected.abs(), result.abs()
    torch.testing.assert_close(expected.to(result), result, rtol=1e-5, atol=1e-5 * float(result.abs().max()))


@pytest.mark.parametrize("slug", LAYERWISE)
@pytest.mark.parametrize("shape", [(1, 1), (1,), (1, 1, 1)])
def test_a_layer_of_one_cell_has_a_defined_map(slug: str, shape: tuple[int, ...]) -> None:
    """One finite value: by the formula where it has one, zero where cells would have to differ."""
    activation, gradient = random_pair(1, 2, 4, *shape)

    result = layer_map(slug, evidence_of(activation + 0.1, gradient))

    assert (2, *shape) == result.shape
    assert result.isfinite().all()


@pytest.mark.parametrize("slug", LAYERWISE)
@pytest.mark.parametrize("value", [-2.0, 0.0, 3.0])
def test_a_constant_layer_has_a_constant_map(slug: str, value: float) -> None:
    """Negative ones and dead ones too; where the gradient is constant as well, no cell is told from another, and none is NaN."""
    activation = torch.full((2, 3, 4, 5), value)

    result = layer_map(slug, evidence_of(activation, torch.full_like(activation, 0.5)))

    torch.testing.assert_close(result[:, :1, :1].expand_as(result), result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slug", LAYERWISE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_is_broken_alone(slug: str, bad: float) -> None:
    """What is not finite shows in its own row and leaves the bits of its neighbours alone."""
    activation, gradient = random_pair(2, 3, 4, 3, 3)
    expected = layer_map(slug, evidence_of(activation, gradient))
    activation, gradient = activation.clone(), gradient.clone()
    gradient[1, :, 0, 0] = activation[1, :, 0, 0] = bad

    result = layer_map(slug, evidence_of(activation, gradient))

    assert not result[1].isfinite().all()
    assert expected[[0, 2]].equal(result[[0, 2]])


@pytest.mark.parametrize(
    ("slug", "profile"),
    [
        (slug, profile)
        for slug in LAYERWISE
        for profile in Profile
        # The kernel's width is the number of channels, dead ones too.
        if profile not in METHODS[slug].absent_from and slug != "kpca-cam"
    ],
)
def test_dead_channels_change_nothing(slug: str, profile: Profile) -> None:
    """A channel of zeros, whatever its gradient, neither breaks a weight nor adds to the map."""
    activation, gradient = random_pair(3, 2, 4, 3, 3)
    wider = [torch.cat([values, values[:, :1]], dim=1) for values in (activation, gradient)]
    wider[0][:, -1] = 0

    result = layer_map(slug, evidence_of(*wider), profile)

    torch.testing.assert_close(layer_map(slug, evidence_of(activation, gradient), profile), result)

from __future__ import annotations

import math

import pytest
import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from support.scenes import ModelScene, finish, small_halves
from torch import Tensor
from torchcam.methods import SmoothGradCAMpp

from camserve.server.cam.methods import METHODS as ALL_METHODS
from camserve.server.cam.methods.method import Amplified, Layerwise
from camserve.server.cam.methods.sampling import SAMPLING
from camserve.server.errors import InvalidRequest
from camserve.server.jobs import Parameters, Profile

METHODS = {method.slug: method for method in SAMPLING}
CLASS = 1


def scene_of(slug: str, *, size: tuple[int, ...] = (32, 32), **options: object) -> ModelScene:
    """A row on a small model, as the method reads it."""
    options.setdefault("model", small_halves(axes=len(size)))
    dtype = next(options["model"].parameters()).dtype
    inputs = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return ModelScene(inputs=inputs, reads=METHODS[slug].reads, **options)


def map_of(slug: str, scene: ModelScene) -> Tensor:
    """The finished map under the scene's profile."""
    arithmetic = METHODS[slug].under(scene.profile)
    assert isinstance(arithmetic, Amplified)
    return finish(arithmetic.steps(scene))


@pytest.mark.parametrize("slug", METHODS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_method_takes_any_number_of_axes(slug: str, axes: int) -> None:
    """Every step's map is finite and has the shape of the last, for signals, images and volumes."""
    size = {1: (32,), 2: (32, 24), 3: (8, 12, 8)}[axes]

    result = map_of(slug, scene_of(slug, size=size))

    has_channels = METHODS[slug].arithmetic.has_channels
    assert ((3, *size) if has_channels else tuple(cells // 4 for cells in size)) == tuple(result.shape)


@pytest.mark.parametrize("profile", [Profile.PAPER, Profile.TORCHCAM])
@pytest.mark.parametrize("slug", METHODS)
def test_the_chunk_size_changes_no_map(slug: str, profile: Profile) -> None:
    """One copy at a time or many: the same map within rounding."""
    if profile in METHODS[slug].absent_from:
        return
    alone = map_of(slug, scene_of(slug, profile=profile, chunk_rows=1))

    together = map_of(slug, scene_of(slug, profile=profile, chunk_rows=64))

    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("slug", METHODS)
def test_half_precision_is_widened(slug: str) -> None:
    """A model in bfloat16 takes inputs in bfloat16 and has a map in float32."""
    result = map_of(slug, scene_of(slug, model=small_halves(dtype=torch.bfloat16)))

    assert torch.float32 is result.dtype
    assert bool(result.any())


@pytest.mark.parametrize("slug", METHODS)
def test_nan_in_the_gradient_shows(slug: str) -> None:
    """NaN becomes no plausible map."""
    model = small_halves()
    model.tail[0].weight.data.fill_(math.nan)
    arithmetic = METHODS[slug].arithmetic
    assert isinstance(arithmetic, Amplified)

    *_, last = arithmetic.steps(scene_of(slug, model=model))

    assert bool(last.best().isnan().all())


@pytest.mark.parametrize(
    ("slug", "parameters"),
    [
        ("smoothgrad", Parameters(samples=0)),
        ("smoothgrad", Parameters(noise=-1.0)),
        ("integrated-gradients", Parameters(steps=0)),
        ("smooth-grad-cam++", Parameters(samples=-1)),
        ("smooth-grad-cam++", Parameters(noise=math.inf)),
    ],
)
def test_impossible_parameters_are_refused(slug: str, parameters: Parameters) -> None:
    """No copies, no steps, or noise that is no number."""
    with pytest.raises(InvalidRequest, match="was asked"):
        map_of(slug, scene_of(slug, parameters=parameters))


def test_smoothgrad_agrees_with_captum() -> None:
    """NoiseTunnel over Saliency gives the same mean from the same random numbers."""
    model = small_halves(dtype=torch.float32)
    scene = scene_of("smoothgrad", model=model, parameters=Parameters(samples=7, noise=0.2, seed=3))
    deviation = 0.2 * float(scene.inputs.max() - scene.inputs.min())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = NoiseTunnel(Saliency(model)).attribute(
            scene.inputs.clone().requires_grad_(), nt_samples=7, stdevs=deviation, target=CLASS, abs=False
        )

    torch.testing.assert_close(expected[0], map_of("smoothgrad", scene), rtol=1e-4, atol=1e-6)


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    """The mean of equal gradients is the gradient."""
    scene = scene_of("smoothgrad", parameters=Parameters(samples=3, noise=0.0))

    torch.testing.assert_close(scene.gradient()[0].float(), map_of("smoothgrad", scene))


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_integrated_gradients_agree_with_captum(steps: int) -> None:
    """Captum's default rule and baseline."""
    scene = scene_of("integrated-gradients", parameters=Parameters(steps=steps))
    expected = IntegratedGradients(scene.model).attribute(scene.inputs, target=CLASS, n_steps=steps)

    torch.testing.assert_close(expected[0].float(), map_of("integrated-gradients", scene), rtol=1e-4, atol=1e-6)


def test_integrated_gradients_are_complete() -> None:
    """They add up to what the score gained over the black input."""
    scene = scene_of("integrated-gradients", parameters=Parameters(steps=300))
    gained = scene.score - float(scene.scores(torch.zeros_like(scene.inputs))[0])

    assert gained == pytest.approx(float(map_of("integrated-gradients", scene).double().sum()), abs=2e-3)


def test_smooth_grad_cam_plus_plus_without_noise_is_grad_cam_plus_plus() -> None:
    """The moments of equal gradients are their powers."""
    scene = scene_of("smooth-grad-cam++", parameters=Parameters(samples=2, noise=0.0))
    plain = ALL_METHODS["grad-cam++"].arithmetic
    assert isinstance(plain, Layerwise)
    expected = plain.gather(plain.weigh(scene.evidence(scene.inputs)))[0]

    torch.testing.assert_close(expected, map_of("smooth-grad-cam++", scene), rtol=1e-9, atol=1e-12)


def test_smooth_grad_cam_plus_plus_averages_each_power() -> None:
    """The formula as printed, over copies drawn one by one."""
    parameters = Parameters(samples=4, noise=0.1, seed=9)
    scene = scene_of("smooth-grad-cam++", parameters=parameters)
    generator = scene.generator()
    deviation = 0.1 * (scene.inputs.max() - scene.inputs.min())
    gradients = []
    for _ in range(4):
        noise = torch.randn(scene.inputs.shape, generator=generator).double()
        gradients.append(scene.evidence(scene.inputs + deviation * noise).gradient)
    stacked = torch.cat(gradients)
    mean, squared, cubed = (stacked.pow(power).mean(dim=0) for power in (1, 2, 3))
    activation = scene.activation[0]
    alpha = squared / (2 * squared + activation.sum(dim=(1, 2), keepdim=True) * cubed)
    expected = ((alpha * mean.clamp_min(0)).sum(dim=(1, 2), keepdim=True) * activation).sum(dim=0)

    torch.testing.assert_close(expected, map_of("smooth-grad-cam++", scene), rtol=1e-5, atol=1e-7)


def test_smooth_grad_cam_plus_plus_survives_tiny_gradients() -> None:
    """Scores in a much smaller unit scale the map and do not empty it."""
    expected = map_of("smooth-grad-cam++", scene_of("smooth-grad-cam++"))
    model = small_halves()
    model.tail[-1].weight.data.mul_(1e-30)

    result = map_of("smooth-grad-cam++", scene_of("smooth-grad-cam++", model=model))

    # Grad-CAM++ tends to half the sum of ReLU(g) there, so that only the scale is compared.
    assert 1e-31 < float(result.abs().max() / expected.abs().max()) < 1e-28


def test_torchcam_agrees() -> None:
    """Under its profile, the last noisy copy's part included."""
    model = small_halves(dtype=torch.float32)
    scene = scene_of("smooth-grad-cam++", model=model, profile=Profile.TORCHCAM, parameters=Parameters(seed=21))
    with SmoothGradCAMpp(model, "front.3") as extractor, torch.random.fork_rng():
        output = model(scene.inputs)
        torch.manual_seed(21)
        (expected,) = extractor(CLASS, output)

    result = map_of("smooth-grad-cam++", scene).clamp_min(0)
    torch.testing.assert_close(expected[0], (result - result.min()) / (result.max() - result.min()), rtol=0, atol=1e-5)

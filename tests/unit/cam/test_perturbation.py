from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import Occlusion
from pytorch_grad_cam import SESS, AblationCAM, ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from support.scenes import Halves, ModelScene, finish, small_halves
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchcam.methods import ISCAM, SSCAM
from torchcam.methods import ScoreCAM as TorchcamScoreCAM

from camserve.server.cam.methods.method import Amplified, Reads
from camserve.server.cam.methods.perturbation import PERTURBATION
from camserve.server.errors import InvalidRequest, Unsupported
from camserve.server.jobs import Parameters, Profile

METHODS = {method.slug: method for method in PERTURBATION}
QUICK = Parameters(samples=3, steps=3)
CLASS = 1


def scene_of(slug: str, *, seed: int = 0, size: tuple[int, ...] = (32, 32), **options: object) -> ModelScene:
    """A row on a small model, as the method reads it."""
    options.setdefault("model", small_halves(axes=len(size)))
    dtype = next(options["model"].parameters()).dtype
    inputs = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return ModelScene(inputs=inputs, reads=METHODS[slug].reads, **options)


def map_of(slug: str, scene: ModelScene) -> Tensor:
    """The finished map under the scene's profile."""
    arithmetic = METHODS[slug].under(scene.profile)
    assert isinstance(arithmetic, Amplified)
    return finish(arithmetic.steps(scene))


def stretched(values: Tensor) -> Tensor:
    """Rectified, then min-max normalised, as the libraries' maps are."""
    values = values.clamp_min(0)
    return (values - values.min()) / (values.max() - values.min())


def naive_score_cam(scene: ModelScene, change: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """Score-CAM channel by channel, the mean taken over what `change` makes of each mask."""
    activation = scene.activation[0]
    size = scene.inputs.shape[2:]
    scores = []
    for channel in activation:
        mask = interpolate(channel[None, None], size=size, mode="bilinear", align_corners=False)
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        scores.append(torch.stack([scene.scores(scene.inputs * changed)[0] for changed in change(mask)]).mean())
    weights = torch.softmax(torch.stack(scores), dim=0)
    return sum(weight * channel for weight, channel in zip(weights, activation, strict=True))


@pytest.mark.parametrize("slug", METHODS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_method_takes_any_number_of_axes(slug: str, axes: int) -> None:
    """Every step's map is finite and has the shape of the last, for signals, images and volumes."""
    size = {1: (32,), 2: (32, 24), 3: (8, 12, 8)}[axes]
    scene = scene_of(slug, size=size, parameters=dataclasses.replace(QUICK, window=4, stride=4), chunk_rows=40)

    result = map_of(slug, scene)

    own_size = size if METHODS[slug].reads is Reads.INPUT or slug == "sess" else tuple(cells // 4 for cells in size)
    assert own_size == tuple(result.shape)


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("slug", METHODS)
def test_the_chunk_size_changes_no_map(slug: str, profile: Profile) -> None:
    """One row at a time or many: the same map within rounding."""
    if profile in METHODS[slug].absent_from:
        with pytest.raises(Unsupported, match=slug):
            METHODS[slug].under(profile)
        return
    parameters = dataclasses.replace(QUICK, stride=16, window=16)
    alone = map_of(slug, scene_of(slug, profile=profile, parameters=parameters, chunk_rows=1))

    together = map_of(slug, scene_of(slug, profile=profile, parameters=parameters, chunk_rows=64))

    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("slug", METHODS)
def test_half_precision_is_widened(slug: str) -> None:
    """A model in bfloat16 takes inputs in bfloat16 and has a map in float32."""
    result = map_of(slug, scene_of(slug, model=small_halves(dtype=torch.bfloat16), parameters=QUICK, chunk_rows=64))

    assert torch.float32 is result.dtype
    assert bool(result.any())


@pytest.mark.parametrize("slug", METHODS)
def test_nan_in_the_scores_shows(slug: str) -> None:
    """A model that answers NaN makes a map with NaN, which is flagged later, and never a plausible one."""
    model = small_halves()
    model.tail[-1].bias.data.fill_(math.nan)
    arithmetic = METHODS[slug].arithmetic
    assert isinstance(arithmetic, Amplified)

    *_, last = arithmetic.steps(scene_of(slug, model=model, parameters=QUICK, chunk_rows=64))

    assert bool(last.best().isnan().all())


@pytest.mark.parametrize(
    ("slug", "parameters"),
    [
        ("score-cam", Parameters(channels=0)),
        ("ablation-cam", Parameters(channels=-3)),
        ("ss-cam", Parameters(samples=0)),
        ("ss-cam", Parameters(noise=-0.1)),
        ("ss-cam", Parameters(noise=math.nan)),
        ("is-cam", Parameters(steps=0)),
        ("rise", Parameters(samples=0)),
        ("occlusion", Parameters(window=0)),
        ("occlusion", Parameters(stride=0)),
        ("occlusion", Parameters(window=4, stride=5)),
        ("sess", Parameters(stride=0)),
        ("sess", Parameters(stride=33)),
    ],
)
def test_impossible_parameters_are_refused(slug: str, parameters: Parameters) -> None:
    """Nothing below 1, no noise that is no number, and no stride that leaves cells out."""
    with pytest.raises(InvalidRequest, match=f"^{slug} was asked"):
        map_of(slug, scene_of(slug, parameters=parameters))


@pytest.mark.parametrize("slug", ["score-cam", "ss-cam", "is-cam", "group-cam"])
def test_a_layer_with_other_axes_than_the_input_is_refused(slug: str) -> None:
    """A line of cells cannot mask an image."""
    model = Halves(
        nn.Sequential(small_halves().front, nn.Flatten(2)), nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).double()
    )

    with pytest.raises(Unsupported, match="1 spatial axes cannot mask an input with 2"):
        map_of(slug, scene_of(slug, model=model))


@pytest.mark.parametrize("slug", ["score-cam", "ablation-cam", "group-cam", "sess"])
def test_a_layer_of_one_cell_has_a_map(slug: str) -> None:
    """There a channel marks nothing: zero where masks are made of it, a number elsewhere."""
    halves = small_halves()
    model = Halves(nn.Sequential(halves.front, nn.AdaptiveAvgPool2d(1)), halves.tail)

    result = map_of(slug, scene_of(slug, model=model, chunk_rows=64))

    assert (slug == "ablation-cam") == bool(result.any())


def test_score_cam_is_algorithm_1() -> None:
    """As one channel after the other."""
    scene = scene_of("score-cam")

    expected = naive_score_cam(scene, lambda mask: [mask])

    torch.testing.assert_close(expected, map_of("score-cam", scene), rtol=1e-9, atol=1e-9)


def test_score_cam_gives_the_channels_so_far() -> None:
    """A partial map is Score-CAM over the channels tried so far."""
    scene = scene_of("score-cam", chunk_rows=4)
    arithmetic = METHODS["score-cam"].arithmetic
    assert isinstance(arithmetic, Amplified)
    model = small_halves()
    first = Halves(
        nn.Sequential(model.front, FirstChannels(4)), nn.Sequential(PutBack(model, scene.inputs), model.tail)
    )

    partial = next(arithmetic.steps(scene))

    assert (4, 12) == (partial.done, partial.total)
    weights = []
    for channel in range(4):
        mask = interpolate(scene.activation[:, channel, None], size=(32, 32), mode="bilinear", align_corners=False)
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        weights.append(scene.scores(scene.inputs * mask)[0])
    expected = torch.einsum("c,chw->hw", torch.softmax(torch.stack(weights), 0), first.front(scene.inputs)[0])
    torch.testing.assert_close(expected, partial.best(), rtol=1e-9, atol=1e-9)


class FirstChannels(nn.Module):
    """Keeps the first channels."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(b c h w) to (b count h w)."""
        return x[:, : self.count]


class PutBack(nn.Module):
    """Appends the channels that were cut off."""

    def __init__(self, model: Halves, inputs: Tensor) -> None:
        super().__init__()
        self.rest = model.front(inputs).detach()

    def forward(self, x: Tensor) -> Tensor:
        """(b few h w) to (b c h w)."""
        return torch.cat([x, self.rest[:, x.shape[1] :].expand(len(x), -1, -1, -1)], dim=1)


def test_a_channel_budget_takes_the_largest_gradients_first() -> None:
    """With three channels allowed, the other nine have no weight."""
    scene = scene_of("ablation-cam", parameters=Parameters(channels=3))
    magnitude = scene.gradient()[0].abs().mean(dim=(1, 2))
    activation = scene.activation
    expected = torch.zeros_like(activation[0, 0])
    for channel in magnitude.argsort(descending=True)[:3]:
        ablated = activation.clone()
        ablated[:, channel] = 0
        expected += (scene.score - scene.tail_scores(ablated)[0]) / abs(scene.score) * activation[0, channel]

    torch.testing.assert_close(expected, map_of("ablation-cam", scene), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slug", ["score-cam", "ablation-cam", "ss-cam", "is-cam"])
def test_a_budget_beyond_the_channels_is_all_of_them(slug: str) -> None:
    """A generous budget changes nothing."""
    without = map_of(slug, scene_of(slug, parameters=QUICK))

    torch.testing.assert_close(
        without, map_of(slug, scene_of(slug, parameters=dataclasses.replace(QUICK, channels=999))), rtol=0, atol=0
    )


def test_score_cam_leaves_constant_channels_out() -> None:
    """A channel of one value everywhere marks nothing: the map is that of the others."""
    model = small_halves()
    model.front[2].weight.data[5] = 0
    model.front[2].bias.data[5] = 3.0
    scene = scene_of("score-cam", model=model)
    others = [channel for channel in range(12) if channel != 5]
    scores = []
    for channel in others:
        mask = interpolate(scene.activation[:, channel, None], size=(32, 32), mode="bilinear", align_corners=False)
        scores.append(scene.scores(scene.inputs * (mask - mask.min()) / (mask.max() - mask.min()))[0])
    expected = torch.einsum("c,chw->hw", torch.softmax(torch.stack(scores), 0), scene.activation[0, others])

    torch.testing.assert_close(expected, map_of("score-cam", scene), rtol=1e-9, atol=1e-9)


def test_is_cam_is_the_mean_along_the_mask() -> None:
    """With three steps: at a third, two thirds and the whole of each mask."""
    scene = scene_of("is-cam", parameters=QUICK)

    expected = naive_score_cam(scene, lambda mask: [mask * share for share in (1 / 3, 2 / 3, 1)])

    torch.testing.assert_close(expected, map_of("is-cam", scene), rtol=1e-9, atol=1e-9)


def test_ss_cam_without_noise_is_score_cam() -> None:
    """The mean over equal copies is the copy."""
    expected = map_of("score-cam", scene_of("score-cam"))

    result = map_of("ss-cam", scene_of("ss-cam", parameters=Parameters(samples=2, noise=0.0)))

    torch.testing.assert_close(expected, result, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slug", ["ss-cam", "rise"])
def test_the_seed_decides(slug: str) -> None:
    """The same seed gives the same map, another gives another."""
    first, again, other = (
        map_of(slug, scene_of(slug, parameters=dataclasses.replace(QUICK, seed=seed))) for seed in (4, 4, 5)
    )

    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("ends_in_relu", [True, False])
@pytest.mark.parametrize("slug", ["score-cam", "ablation-cam"])
def test_pytorch_grad_cam_agrees(slug: str, ends_in_relu: bool) -> None:  # noqa: FBT001
    """Under its profile, within 1e-4 after its own normalisation; also where no zero is the layer's minimum."""
    model = small_halves(channels=40, dtype=torch.float32, ends_in_relu=ends_in_relu)
    scene = scene_of(slug, model=model, profile=Profile.PYTORCH_GRAD_CAM)
    library = {"score-cam": ScoreCAM, "ablation-cam": AblationCAM}[slug]
    layer = [scene.model.front[-1]]
    expected = library(scene.model, layer)(scene.inputs, [ClassifierOutputTarget(CLASS)])[0]

    result = stretched(map_of(slug, scene))

    large = interpolate(result[None, None], size=(32, 32), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(torch.from_numpy(expected), stretched(large), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("slug", "library"),
    [
        ("score-cam", TorchcamScoreCAM),
        ("ss-cam", lambda model, layer: SSCAM(model, layer, num_samples=3)),
        ("is-cam", lambda model, layer: ISCAM(model, layer, num_samples=3)),
    ],
)
def test_torchcam_agrees(slug: str, library: Callable[..., object]) -> None:
    """Under its profile, within 1e-4, from the same random numbers."""
    model = small_halves(dtype=torch.float32)
    scene = scene_of(slug, model=model, profile=Profile.TORCHCAM, parameters=dataclasses.replace(QUICK, seed=11))
    with library(model, "front.3") as extractor, torch.random.fork_rng(), torch.no_grad():
        output = model(scene.inputs)
        torch.manual_seed(11)
        (expected,) = extractor(CLASS, output)

    torch.testing.assert_close(expected[0], stretched(map_of(slug, scene)), rtol=0, atol=1e-4)


def test_ablation_cam_takes_channels_away_one_by_one() -> None:
    """The naive loop's weights, (y - y_k) / |y|."""
    scene = scene_of("ablation-cam")
    activation = scene.activation
    expected = torch.zeros_like(activation[0, 0])
    for channel in range(activation.shape[1]):
        ablated = activation.clone()
        ablated[:, channel] = 0
        weight = (scene.score - scene.tail_scores(ablated)[0]) / abs(scene.score)
        expected += weight * activation[0, channel]

    torch.testing.assert_close(expected, map_of("ablation-cam", scene), rtol=1e-9, atol=1e-9)


def test_ablation_cam_points_at_the_evidence_whatever_the_sign_of_the_score() -> None:
    """A bias that makes the score negative changes the map's scale, not its direction."""
    scene = scene_of("ablation-cam")
    shifted = small_halves()
    shifted.tail[-1].bias.data[CLASS] -= 2 * scene.score
    expected = map_of("ablation-cam", scene)

    torch.testing.assert_close(
        expected, map_of("ablation-cam", scene_of("ablation-cam", model=shifted)), rtol=1e-6, atol=1e-9
    )


def test_ablation_cam_is_defined_for_a_score_near_zero() -> None:
    """The plain drops then are the weights."""
    scene = scene_of("ablation-cam")
    expected = map_of("ablation-cam", scene) * abs(scene.score)
    model = small_halves()
    model.tail[-1].bias.data[CLASS] -= scene.score

    result = map_of("ablation-cam", scene_of("ablation-cam", model=model))

    torch.testing.assert_close(expected, result, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("profile", [Profile.PAPER, Profile.PYTORCH_GRAD_CAM])
def test_ablation_cam_of_scores_that_are_all_zero_is_zero(profile: Profile) -> None:
    """No drop and no score to share it by: no evidence, and no NaN."""
    model = small_halves()
    for parameter in model.tail[-1].parameters():
        parameter.data.zero_()

    assert not bool(map_of("ablation-cam", scene_of("ablation-cam", model=model, profile=profile)).any())


def test_ablation_cam_survives_a_model_that_writes_into_its_layer() -> None:
    """An in-place ReLU right behind the layer spoils no later chunk."""
    model = small_halves(ends_in_relu=False)
    expected = map_of(
        "ablation-cam", scene_of("ablation-cam", model=Halves(model.front, nn.Sequential(nn.ReLU(), model.tail)))
    )
    writing = Halves(model.front, nn.Sequential(nn.ReLU(inplace=True), model.tail))

    torch.testing.assert_close(expected, map_of("ablation-cam", scene_of("ablation-cam", model=writing)))


def test_ablation_cam_of_a_dead_layer_is_zero() -> None:
    """With nothing to take away there is no evidence."""
    model = small_halves()
    model.front[2].weight.data.zero_()
    model.front[2].bias.data.fill_(-1)

    assert not bool(map_of("ablation-cam", scene_of("ablation-cam", model=model)).any())


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (7, 3), (32, 1), (5, 5)])
def test_occlusion_agrees_with_captum(window: int, stride: int) -> None:
    """The same patches, cut off at the far edge, and the same averages."""
    scene = scene_of("occlusion", parameters=Parameters(window=window, stride=stride))
    expected = Occlusion(scene.model).attribute(
        scene.inputs, sliding_window_shapes=(3, window, window), strides=(3, stride, stride), target=CLASS
    )

    result = map_of("occlusion", scene)

    torch.testing.assert_close(expected[0, 0].float(), result, rtol=1e-5, atol=1e-6)


def test_occlusion_covers_all_parts_soon() -> None:
    """After a quarter of the patches, every quarter of the image has been looked at."""
    arithmetic = METHODS["occlusion"].arithmetic
    assert isinstance(arithmetic, Amplified)
    steps = arithmetic.steps(scene_of("occlusion", chunk_rows=1))

    partial = next(step for step in steps if step.done * 4 >= step.total).best()

    assert all(bool(quarter.any()) for half in partial.chunk(2) for quarter in half.chunk(2, dim=1))


def test_rise_finds_the_only_pixel_that_counts() -> None:
    """For a score that is one pixel, the mean mask is highest around it."""

    class Pixel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0, 20, 9, None].expand(-1, 4)

    model = Halves(nn.Identity(), Pixel())
    scene = ModelScene(
        model=model,
        inputs=torch.ones(1, 3, 32, 32),
        reads=Reads.INPUT,
        parameters=Parameters(samples=800),
        chunk_rows=100,
    )

    result = map_of("rise", scene)

    row, column = divmod(int(result.argmax()), 32)
    assert abs(row - 20) <= 2
    assert abs(column - 9) <= 2


def test_rise_is_the_mean_of_masks_by_score() -> None:
    """For a score that is always 1, every pixel is near 1: the masks' expectation is what it is divided by."""
    model = Halves(nn.Identity(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)))
    model.tail[1].weight.data.zero_()
    model.tail[1].bias.data.fill_(1)
    scene = ModelScene(
        model=model,
        inputs=torch.ones(1, 3, 32, 32),
        reads=Reads.INPUT,
        parameters=Parameters(samples=2000),
        chunk_rows=200,
    )

    torch.testing.assert_close(torch.ones(32, 32), map_of("rise", scene), rtol=0, atol=0.12)


def test_group_cam_is_its_official_loop() -> None:
    """Group by group at the input's resolution, enlarged and blurred as the official code does; ours enlarged equals it."""
    scene = scene_of("group-cam", model=small_halves(channels=70), size=(32, 64), chunk_rows=64)
    weights = scene.gradient().mean(dim=(2, 3), keepdim=True)
    blurred = official_blur(scene.inputs)
    baseline = scene.scores(blurred)[0]
    expected = torch.zeros(32, 64, dtype=torch.float64)
    for group in (weights * scene.activation).chunk(32, dim=1):
        mask = group.sum(dim=1, keepdim=True).clamp_min(0)
        threshold = np.percentile(mask.numpy(), 70)
        mask = torch.where(mask > threshold, mask, 0)
        mask = interpolate(mask, size=(32, 64), mode="bilinear", align_corners=False)
        if mask.max() == mask.min():
            continue
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        gain = scene.scores(scene.inputs * mask + blurred * (1 - mask))[0] - baseline
        expected += gain * mask[0, 0]

    result = map_of("group-cam", scene)

    large = interpolate(result[None, None], size=(32, 64), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(expected, large, rtol=1e-7, atol=1e-9)


def official_blur(values: Tensor) -> Tensor:
    """A 51 x 51 Gaussian of sigma 50, edges mirrored, as a direct convolution."""
    line = torch.exp(-(torch.arange(-25, 26, dtype=torch.float64) ** 2) / (2 * 50.0**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = torch.nn.functional.pad(values, (25, 25, 25, 25), mode="reflect")
    return torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 51, 51), groups=3)


def test_sess_agrees_with_pytorch_grad_cam() -> None:
    """With scores in place of softmax as its weights, within 1e-4 after normalisation."""
    scene = scene_of("sess", model=small_halves(dtype=torch.float32), profile=Profile.PYTORCH_GRAD_CAM)
    assert scene.score > 0
    library = SESS(scene.model, [scene.model.front[-1]], use_softmax_scores=False)
    expected = library(scene.inputs, [ClassifierOutputTarget(CLASS)])[0]

    result = map_of("sess", scene)

    torch.testing.assert_close(torch.from_numpy(expected), stretched(result), rtol=0, atol=1e-4)


def test_sess_weighs_nothing_where_no_score_is_positive() -> None:
    """Scores below zero everywhere leave the plain mean, not an empty map."""
    model = small_halves()
    model.tail[-1].bias.data[CLASS] -= 1e6

    result = map_of("sess", scene_of("sess", model=model))

    assert float(result.max()) > 0

from __future__ import annotations

import pytest
import torch
from pytorch_grad_cam import GradCAM, LayerCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from support.scenes import ModelScene, finish, small_halves
from torch.nn.functional import interpolate

from camserve.server.cam.methods import METHODS, first_component
from camserve.server.cam.methods.augmentation import augmented
from camserve.server.cam.methods.method import Layerwise
from camserve.server.jobs import Profile

CLASS = 1


def scene_of(*, size: tuple[int, ...] = (32, 48), **options: object) -> ModelScene:
    """A row on a small model."""
    options.setdefault("model", small_halves(axes=len(size)))
    dtype = next(options["model"].parameters()).dtype
    inputs = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return ModelScene(inputs=inputs, **options)


def layerwise(slug: str) -> Layerwise:
    """A method's arithmetic."""
    arithmetic = METHODS[slug].arithmetic
    assert isinstance(arithmetic, Layerwise)
    return arithmetic


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("chunk_rows", [1, 4, 6])
def test_it_is_the_mean_over_six_copies(axes: int, chunk_rows: int) -> None:
    """One copy after the other, flipped back; whatever the chunks and the number of axes."""
    scene = scene_of(size=(12, 16, 32)[-axes:], chunk_rows=chunk_rows)
    method = layerwise("grad-cam")
    maps = []
    for factor in (0.9, 1.0, 1.1):
        maps.append(method.gather(method.weigh(scene.evidence(scene.inputs * factor)))[0])
        flipped = scene.evidence(scene.inputs.flip(-1) * factor)
        maps.append(method.gather(method.weigh(flipped))[0].flip(-1))

    result = finish(augmented(method).steps(scene))

    torch.testing.assert_close(torch.stack(maps).mean(dim=0), result, rtol=1e-9, atol=1e-12)


def test_the_first_map_is_the_plain_one() -> None:
    """What a deadline leaves after one pass is the map without augmentation."""
    scene = scene_of(chunk_rows=1)
    method = layerwise("layercam")

    first = next(iter(augmented(method).steps(scene)))

    assert (1, 6) == (first.done, first.total)
    torch.testing.assert_close(method.gather(method.weigh(scene.evidence(scene.inputs)))[0], first.best())


@pytest.mark.parametrize(("slug", "library"), [("grad-cam", GradCAM), ("layercam", LayerCAM)])
def test_pytorch_grad_cam_agrees(slug: str, library: type[GradCAM]) -> None:
    """Under its profile the enlarged map is the library's, without another normalisation."""
    model = small_halves(dtype=torch.float32)
    scene = scene_of(model=model, profile=Profile.PYTORCH_GRAD_CAM)
    expected = library(model, [model.front[-1]])(scene.inputs, [ClassifierOutputTarget(CLASS)], aug_smooth=True)[0]

    result = finish(augmented(layerwise(slug)).steps(scene))

    large = interpolate(result[None, None], size=(32, 48), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(torch.from_numpy(expected), large, rtol=0, atol=1e-5)


@pytest.mark.parametrize("profile", [Profile.PAPER, Profile.PYTORCH_GRAD_CAM])
def test_a_map_of_zeros_stays_so(profile: Profile) -> None:
    """Nothing to normalise is no reason for NaN."""
    model = small_halves()
    model.tail[-1].weight.data.zero_()

    assert not bool(finish(augmented(layerwise("grad-cam")).steps(scene_of(model=model, profile=profile))).any())


def test_components_may_stand_in_for_the_sum() -> None:
    """Eigen smoothing and augmentation go together."""
    method = Layerwise(layerwise("grad-cam").weigh, first_component)

    assert (8, 12) == tuple(finish(augmented(method).steps(scene_of())).shape)

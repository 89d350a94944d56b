import copy
import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import Tensor, nn

from camserve.server.cam.maps import resize
from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.layout import Layout, LayoutKind
from camserve.server.engine.passes import Mapped, PassModel, run_pass
from camserve.server.engine.program import TapName
from camserve.server.jobs import FloatArray, Profile, RawMap, Spec, Target, TargetKind

LIBRARY = {
    "grad-cam": pytorch_grad_cam.GradCAM,
    "grad-cam++": pytorch_grad_cam.GradCAMPlusPlus,
    "xgrad-cam": pytorch_grad_cam.XGradCAM,
    "hirescam": pytorch_grad_cam.HiResCAM,
    "layercam": pytorch_grad_cam.LayerCAM,
}
SIDE = 64
CLASSES = [3, 0]


class TinyCnn(nn.Module):
    """Three convolutions whose head sees every cell, so that gradients differ from cell to cell."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 10), nn.ReLU(), nn.Linear(10, 5)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b 5)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def resnet18() -> nn.Module:
    """Random weights: what is compared is arithmetic."""
    net: nn.Module = torchvision.models.resnet18(weights=None, num_classes=7)
    return net


# A last map, one in the middle, and one before a nonlinear head.
CASES = [
    pytest.param(resnet18, "layer4", id="resnet18 last"),
    pytest.param(resnet18, "layer2", id="resnet18 middle"),
    pytest.param(TinyCnn, "features.5", id="tiny last"),
    pytest.param(TinyCnn, "features.2", id="tiny signed"),
]


@functools.cache
def net_of(factory: Callable[[], nn.Module]) -> nn.Module:
    """The same weights for both sides."""
    torch.manual_seed(0)
    return factory().eval()


def images() -> Tensor:
    """Noise (2 3 h w)."""
    return torch.randn(len(CLASSES), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@functools.cache
def our_maps(factory: Callable[[], nn.Module], layer: str) -> dict[tuple[str, Profile, int], FloatArray]:
    """Every method under both profiles, all from one pass, by method, profile and row."""
    program = EagerProgram(copy.deepcopy(net_of(factory)), device="cpu")
    activation = program.capture([TapName(layer)], images()).activations[TapName(layer)]
    layout = Layout(kind=LayoutKind.CHANNELS_FIRST, grid=tuple(activation.shape[2:]), channels=activation.shape[1])
    model = PassModel(program=program, layouts={layer: layout}, classes=program.run(images()).shape[1])
    kinds = list(itertools.product([*LIBRARY, "eigen-cam"], [Profile.PAPER, Profile.PYTORCH_GRAD_CAM]))
    rows = [
        tuple(
            Spec(
                index=index,
                method=method,
                layers=(layer,),
                target=Target(kind=TargetKind.CLASS_INDEX, value=class_index),
                profile=profile,
                rectify=False,
            )
            for index, (method, profile) in enumerate(kinds)
        )
        for class_index in CLASSES
    ]
    return {
        (*kinds[event.result.spec_index], event.row): event.result.values
        for event in run_pass(model, images(), rows)
        if isinstance(event, Mapped) and isinstance(event.result, RawMap)
    }


def scaled(values: FloatArray) -> FloatArray:
    """Min-max as the library does it."""
    values = values - values.min()
    return np.asarray(values / (np.float32(1e-7) + values.max()), dtype=np.float32)


def as_the_library_shows_it(values: FloatArray) -> FloatArray:
    """ReLU, min-max, bilinear to the input, and min-max again."""
    small = torch.from_numpy(scaled(np.maximum(values, 0)))
    return scaled(resize(small, (SIDE, SIDE)).numpy())


@pytest.mark.parametrize(("factory", "layer"), CASES)
@pytest.mark.parametrize("method", LIBRARY)
def test_maps_are_the_librarys(factory: Callable[[], nn.Module], layer: str, method: str) -> None:
    """Under its profile, within 1e-5 of the library's normalised maps, in a batch of different targets."""
    net = net_of(factory)
    library = LIBRARY[method](net, [net.get_submodule(layer)])
    expected = library(images(), [ClassifierOutputTarget(index) for index in CLASSES])
    library.activations_and_grads.release()

    for row in range(len(CLASSES)):
        ours = our_maps(factory, layer)[method, Profile.PYTORCH_GRAD_CAM, row]
        np.testing.assert_allclose(expected[row], as_the_library_shows_it(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("factory", "layer"), CASES)
@pytest.mark.parametrize("method", ["grad-cam", "hirescam", "layercam"])
def test_profiles_agree_where_the_library_follows_the_paper(
    factory: Callable[[], nn.Module], layer: str, method: str
) -> None:
    """No constant in a denominator, no difference: not a bit."""
    maps = our_maps(factory, layer)

    for row in range(len(CLASSES)):
        paper, library = (maps[method, profile, row] for profile in (Profile.PAPER, Profile.PYTORCH_GRAD_CAM))
        np.testing.assert_array_equal(paper, library)


@pytest.mark.parametrize(("factory", "layer"), CASES)
def test_eigen_cam_is_the_librarys_up_to_sign(factory: Callable[[], nn.Module], layer: str) -> None:
    """The library's component is compared before its ReLU, since its sign is arbitrary; ours is always the same."""
    program = EagerProgram(copy.deepcopy(net_of(factory)), device="cpu")
    activation = program.capture([TapName(layer)], images()).activations[TapName(layer)]
    expected = get_2d_projection(activation.detach().numpy())

    for row in range(len(CLASSES)):
        ours = our_maps(factory, layer)["eigen-cam", Profile.PAPER, row]
        sign = np.sign((expected[row] * ours).sum())
        np.testing.assert_allclose(sign * expected[row], ours, rtol=0, atol=1e-5 * np.abs(expected[row]).max())

import captum.attr
import pytest
import torch
from support.evidence import whole_map
from torch import Tensor, nn

from camserve.server.cam.methods import METHODS, Evidence, Whole
from camserve.server.errors import Unsupported

X = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]])
DX = torch.tensor([[[0.5, 2.0], [-1.0, 7.0]]])


class SmallNet(nn.Module):
    """Two convolutions and a head that sees every cell."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(5, 6, 3, stride=2), nn.ReLU())
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 3 * 3, 4))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 15 15) to (b 4)."""
        logits: Tensor = self.head(self.body(self.stem(images)))
        return logits


@pytest.fixture
def net() -> SmallNet:
    """A net that captum may put its hooks on."""
    return SmallNet()


@pytest.fixture
def images() -> Tensor:
    """Two of them."""
    return torch.randn(2, 3, 15, 15, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize(
    ("slug", "evidence", "expected"),
    [
        ("vanilla-backprop", Evidence(activation=X, gradient=DX), DX),
        ("gradient-times-input", Evidence(activation=X, gradient=DX), torch.tensor([[[0.5, -4.0], [-3.0, 0.0]]])),
        ("guided-backprop", Evidence(activation=X, input_gradient=DX), DX),
        ("deconvnet", Evidence(activation=X, input_gradient=DX), DX),
    ],
)
def test_maps_worked_out_by_hand(slug: str, evidence: Evidence, expected: Tensor) -> None:
    """Signed, with the input's channels, in the units of the score."""
    assert expected.equal(whole_map(slug, evidence))
    assert not METHODS[slug].rectifies


def test_guided_grad_cam_worked_out_by_hand() -> None:
    """Weight 2 makes the map (-2, 6), rectified (0, 6), enlarged over four cells (0, 1.5, 4.5, 6)."""
    layer = Evidence(
        activation=torch.tensor([[[-1.0, 3.0]]]),
        gradient=torch.tensor([[[1.0, 3.0]]]),
        input_gradient=torch.tensor([[[1.0, 1.0, -1.0, 2.0], [0.0, 2.0, 1.0, 0.5]]]),
    )

    assert [[[0.0, 1.5, -4.5, 12.0], [0.0, 3.0, 4.5, 3.0]]] == whole_map("guided-grad-cam", layer).tolist()


def test_guided_grad_cam_of_several_layers_takes_the_mean_of_their_maps() -> None:
    """Each is enlarged first; one that has no positive evidence takes part as zero."""
    guided = torch.ones(1, 1, 4)
    fine = Evidence(activation=torch.ones(1, 1, 4), gradient=torch.ones(1, 1, 4), input_gradient=guided)
    coarse = Evidence(activation=torch.ones(1, 2, 2), gradient=-torch.ones(1, 2, 2), input_gradient=guided)

    assert [[[0.5] * 4]] == whole_map("guided-grad-cam", fine, coarse).tolist()


def test_a_layer_without_the_inputs_axes_cannot_be_laid_over_it() -> None:
    """Tokens of a sequence over an image: the refusal says what would do."""
    layer = Evidence(
        activation=torch.ones(1, 2, 9), gradient=torch.ones(1, 2, 9), input_gradient=torch.ones(1, 3, 8, 8)
    )

    with pytest.raises(Unsupported, match="1 spatial axes cannot be laid over an input with 2; choose a layer"):
        whole_map("guided-grad-cam", layer)


def test_captum_has_the_same_gradients(net: SmallNet, images: Tensor) -> None:
    """Saliency without magnitudes, and input times gradient."""
    (gradient,) = torch.autograd.grad(net(images)[:, 1].sum(), images)
    evidence = Evidence(activation=images.detach(), gradient=gradient)
    vanilla = captum.attr.Saliency(net).attribute(images, target=1, abs=False)
    product = captum.attr.InputXGradient(net).attribute(images, target=1)

    torch.testing.assert_close(vanilla, whole_map("vanilla-backprop", evidence))
    torch.testing.assert_close(product.detach(), whole_map("gradient-times-input", evidence))


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_captum_has_the_same_guided_grad_cam(net: SmallNet, images: Tensor) -> None:
    """Given captum's guided gradient, and with its interpolation set to ours: its default is nearest."""
    activation = net.body(net.stem(images)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.head(activation)[:, 2].sum(), activation)
    guided = captum.attr.GuidedBackprop(net).attribute(images, target=2)
    library = captum.attr.GuidedGradCam(net, net.body)
    expected = library.attribute(images, target=2, interpolate_mode="bilinear")

    result = whole_map(
        "guided-grad-cam",
        Evidence(activation=activation.detach(), gradient=gradient, input_gradient=guided.detach()),
    )

    torch.testing.assert_close(expected.detach(), result, rtol=1e-5, atol=1e-7)


def test_half_gradients_are_widened() -> None:
    """Products of small values survive that float16 would lose."""
    tiny = torch.full((1, 1, 2), 1e-4, dtype=torch.float16)

    result = whole_map("gradient-times-input", Evidence(activation=tiny, gradient=tiny))

    assert torch.float32 == result.dtype
    assert (result > 0).all()


def test_maps_of_input_space_keep_their_channels() -> None:
    """The engine and the saliency reductions are told so."""
    slugs = ["vanilla-backprop", "gradient-times-input", "guided-backprop", "deconvnet", "guided-grad-cam"]

    assert all(isinstance(m := METHODS[slug].arithmetic, Whole) and m.has_channels for slug in slugs)

import pytest
import pytorch_grad_cam
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from support.evidence import whole_map
from torch import Tensor, nn

from camserve.server.cam.methods import Evidence
from camserve.server.cam.methods.fullgrad import completeness
from camserve.server.jobs import Profile


class BiasedNet(nn.Module):
    """Convolutions with biases and statistics, pooling, two linear layers: all the constants a net usually has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 4, 3, stride=2)
            self.norm = nn.BatchNorm2d(4)
            self.body = nn.Conv2d(4, 6, 3, stride=2)
            self.neck = nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)
            nn.init.normal_(self.norm.running_mean)
            nn.init.uniform_(self.norm.running_var, 0.5, 2)
            nn.init.normal_(self.norm.bias)
        self.eval().double()

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b 3)."""
        features = self.body(self.norm(self.stem(images)).relu()).relu()
        logits: Tensor = self.head(self.neck(features.mean(dim=(2, 3))).relu())
        return logits

    def constants(self) -> list[tuple[nn.Module, Tensor]]:
        """What each layer adds to its channels."""
        norm = self.norm
        shift = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        return [
            (self.stem, self.stem.bias),
            (norm, shift),
            (self.body, self.body.bias),
            (self.neck, self.neck.bias),
            (self.head, self.head.bias),
        ]


def evidences_of(net: BiasedNet, images: Tensor, classes: list[int]) -> tuple[list[Evidence], Tensor]:
    """The input first, then every layer that adds a constant; and the scores."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
        for layer, _ in net.constants()
    ]
    leaf = images.clone().requires_grad_()
    scores = net(leaf).gather(1, torch.tensor(classes)[:, None])[:, 0]
    for handle in handles:
        handle.remove()
    first, *rest = torch.autograd.grad(scores.sum(), [leaf, *outputs])
    layers = [
        Evidence(activation=output.detach(), gradient=gradient, bias=bias.detach())
        for output, gradient, (_, bias) in zip(outputs, rest, net.constants(), strict=True)
    ]
    return [Evidence(activation=images, gradient=first), *layers], scores.detach()


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_contributions_add_up_to_the_score(seed: int) -> None:
    """Completeness: x dx and all b g, those of linear layers too, are the logit and nothing else."""
    images = torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    evidences, scores = evidences_of(BiasedNet(seed), images, [0, 2])

    torch.testing.assert_close(scores, completeness(evidences), rtol=1e-9, atol=1e-9)


def test_a_map_worked_out_by_hand() -> None:
    """Both channels of a place share one range; the layer's two cells are enlarged with aligned corners."""
    at_input = Evidence(
        activation=torch.tensor([[[1.0, -2.0, 0.0], [4.0, 1.0, 1.0]]]),
        gradient=torch.tensor([[[1.0, 1.0, 5.0], [1.0, 0.0, -1.0]]]),
    )
    layer = Evidence(activation=torch.zeros(1, 1, 2), gradient=torch.tensor([[[-1.0, 3.0]]]), bias=torch.tensor([-2.0]))

    # |x dx| = (1 2 0), (4 0 1), over 4; |b g| = (2 6), rescaled to (0 1).
    assert [[1.25, 0.5 + 0.5, 0.25 + 1.0]] == whole_map("fullgrad", at_input, layer).tolist()
    # Each channel over its own range; cell centres at half positions give (0, 1/2, 1) here as well.
    by_channel = whole_map("fullgrad", at_input, layer, profile=Profile.PYTORCH_GRAD_CAM)
    torch.testing.assert_close(torch.tensor([[0.5 + 1.0, 1.0 + 0.5, 0.25 + 1.0]]), by_channel)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_weak_scores_are_drawn_as_strong_ones(scale: float) -> None:
    """No constant in a denominator outweighs a small gradient."""
    evidences, _ = evidences_of(BiasedNet(1), torch.randn(1, 3, 12, 12, dtype=torch.float64), [1])
    scaled = [Evidence(activation=e.activation, gradient=scale * e.gradient, bias=e.bias) for e in evidences]

    torch.testing.assert_close(whole_map("fullgrad", *evidences), whole_map("fullgrad", *scaled))


def test_no_gradient_gives_an_empty_map() -> None:
    """Where nothing influences the score, nothing is drawn, and nothing is NaN."""
    images = torch.ones(2, 3, 4, 4)
    layer = Evidence(activation=torch.ones(2, 2, 2, 2), gradient=torch.zeros(2, 2, 2, 2), bias=torch.ones(2))

    result = whole_map("fullgrad", Evidence(activation=images, gradient=torch.zeros_like(images)), layer)

    assert torch.zeros(2, 4, 4).equal(result)


def test_a_broken_row_is_nan_alone() -> None:
    """NaN in one row's gradient leaves its neighbour's bits alone."""
    evidences, _ = evidences_of(BiasedNet(2), torch.randn(2, 3, 12, 12, dtype=torch.float64), [0, 0])
    expected = whole_map("fullgrad", *evidences)
    evidences[2].gradient[0, 0, 0, 0] = torch.nan

    result = whole_map("fullgrad", *evidences)

    assert result[0].isnan().any()
    assert expected[1].equal(result[1])


def test_pytorch_grad_cam_draws_the_same_under_its_profile() -> None:
    """Its whole class on the same net; it stretches the result, and so do we here."""
    net, images = BiasedNet(3).float(), torch.randn(2, 3, 15, 11, generator=torch.Generator().manual_seed(3))
    evidences, _ = evidences_of(net, images, [2, 1])
    with pytorch_grad_cam.FullGrad(net, []) as library:
        expected = library(images, [ClassifierOutputTarget(2), ClassifierOutputTarget(1)])

    result = whole_map("fullgrad", *evidences, profile=Profile.PYTORCH_GRAD_CAM)

    low, high = result.amin(dim=(1, 2), keepdim=True), result.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(torch.from_numpy(expected).squeeze(1), (result - low) / (high - low), rtol=0, atol=1e-5)


def test_official_and_library_maps_are_alike_but_not_the_same() -> None:
    """Joint and per-channel ranges correlate; neither is passed off as the other."""
    evidences, _ = evidences_of(BiasedNet(4), torch.randn(1, 3, 24, 24, dtype=torch.float64), [0])
    paper, library = (whole_map("fullgrad", *evidences, profile=p) for p in (Profile.PAPER, Profile.PYTORCH_GRAD_CAM))

    assert not paper.allclose(library, rtol=0.01)
    assert float(torch.corrcoef(torch.stack([paper.flatten(), library.flatten()]))[0, 1]) > 0.8


def test_one_and_three_axes_are_as_two() -> None:
    """A curve and a volume give the map of the image with axes of one."""
    generator = torch.Generator().manual_seed(5)
    x, dx = torch.randn(2, 1, 2, 8, generator=generator)
    g, bias = torch.randn(1, 3, 4, generator=generator), torch.randn(3, generator=generator)

    def draw(*axes: int) -> Tensor:
        """The map with axes of one put in at those places."""
        spread = [x, dx, g]
        for axis in axes:
            spread = [values.unsqueeze(axis) for values in spread]
        layer = Evidence(activation=spread[2], gradient=spread[2], bias=bias)
        return whole_map("fullgrad", Evidence(activation=spread[0], gradient=spread[1]), layer).flatten(1)

    torch.testing.assert_close(draw(), draw(2))
    torch.testing.assert_close(draw(), draw(2, 4))


def test_channels_of_a_linear_layer_over_cells_are_found_last() -> None:
    """Its gradient is (b cells channels), and adds to the same map as a convolution of one cell would."""
    generator = torch.Generator().manual_seed(6)
    at_input = Evidence(activation=torch.ones(1, 2, 8), gradient=torch.randn(1, 2, 8, generator=generator))
    g, bias = torch.randn(1, 3, 4, generator=generator), torch.randn(3, generator=generator)
    convolution = Evidence(activation=g, gradient=g, bias=bias)
    linear = Evidence(activation=g.mT, gradient=g.mT, bias=bias)

    assert completeness([at_input, convolution]).equal(completeness([at_input, linear]))
    assert whole_map("fullgrad", at_input, convolution).equal(whole_map("fullgrad", at_input, linear))

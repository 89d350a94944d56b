import pytest
import torch
import torchcam.methods
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evidence import whole_map
from torch import Tensor

from camserve.server.cam.methods import Evidence
from camserve.server.errors import Unsupported


def probabilities(seed: int, *shape: int) -> Tensor:
    """Attention as a softmax leaves it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).softmax(dim=-1)


def test_legrad_worked_out_by_hand() -> None:
    """Two heads, two queries, a class token and two patches, two layers: means of positive gradients, the class token dropped."""
    first = torch.tensor([[[[9.0, 4.0, -1.0], [9.0, 0.0, 2.0]], [[9.0, -4.0, 2.0], [9.0, 4.0, 0.0]]]])
    layers = [
        Evidence(activation=torch.zeros_like(first), gradient=gradient, grid=(1, 2), prefix=1)
        for gradient in (first, -first)
    ]

    # (4 + 0 + 0 + 4) / 4 and (0 + 2 + 2 + 0) / 4; of the other layer 4 / 4 and 1 / 4.
    assert [[[(2 + 1) / 2, (1 + 0.25) / 2]]] == whole_map("legrad", *layers).tolist()


def test_rollout_worked_out_by_hand() -> None:
    """Rows of (A + I) / 2 multiplied from the last layer to the first, and the class token's row of the product."""
    early = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]])
    late = torch.tensor([[[[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]])
    layers = [Evidence(activation=attention, grid=(2,), prefix=1) for attention in (early, late)]

    # The class token is 3/4 itself and 1/4 the second patch; of itself half is the first patch.
    assert [[0.75 * 0.5, 0.25]] == whole_map("attention-rollout", *layers).tolist()


def test_rollout_without_a_class_token_is_the_mean_over_queries() -> None:
    """Then every token counts the same."""
    attention = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])

    result = whole_map("attention-rollout", Evidence(activation=attention, grid=(2,)))

    assert [[(1.0 + 0.5) / 2, 0.25]] == result.tolist()


@given(seed=st.integers(0, 2**31), depth=st.integers(1, 4), heads=st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_rollout_shares_out_one(seed: int, depth: int, heads: int) -> None:
    """Products of rows that sum to one sum to one: without prefix all of it lies on the grid."""
    layers = [Evidence(activation=probabilities(seed + n, 2, heads, 6, 6), grid=(2, 3)) for n in range(depth)]

    result = whole_map("attention-rollout", *layers)

    assert (2, 2, 3) == result.shape
    torch.testing.assert_close(torch.ones(2, dtype=torch.float64), result.sum(dim=(1, 2)))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_prefix_tokens_are_dropped_and_the_rest_laid_on_the_grid(prefix: int) -> None:
    """Class, distillation and register tokens, in front of a grid that is not square; row by row."""
    gradient = torch.zeros(1, 1, 1, prefix + 6)
    gradient[..., prefix + 4] = 1.0

    result = whole_map("legrad", Evidence(activation=gradient, gradient=gradient, grid=(2, 3), prefix=prefix))

    assert [[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]] == result.tolist()


def test_without_a_grid_the_map_is_a_curve_over_tokens() -> None:
    """As for a model of sequences."""
    gradient = torch.ones(1, 2, 7, 7)

    assert (1, 6) == whole_map("legrad", Evidence(activation=gradient, gradient=gradient, prefix=1)).shape


@pytest.mark.parametrize("slug", ["legrad", "attention-rollout"])
def test_keys_that_do_not_fill_the_grid_are_refused(slug: str) -> None:
    """Windows and pooled keys: the message tells the numbers and what would do."""
    attention = torch.ones(1, 1, 5, 5)

    with pytest.raises(Unsupported, match="over 5 keys, 1 of them before the grid, does not lie on a grid of 2 x 3"):
        whole_map(slug, Evidence(activation=attention, gradient=attention, grid=(2, 3), prefix=1))


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (1, 1, 6, 4), (1, 1, 4, 6)])
def test_rollout_refuses_layers_of_other_tokens(shape: tuple[int, ...]) -> None:
    """A product over different tokens has no meaning."""
    layers = [Evidence(activation=torch.ones(1, 1, 6, 6)), Evidence(activation=torch.ones(shape))]

    with pytest.raises(Unsupported, match="must all be among the same tokens"):
        whole_map("attention-rollout", *layers)


@pytest.mark.parametrize("slug", ["legrad", "attention-rollout"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_is_not_finite_alone(slug: str, bad: float) -> None:
    """It shows in its own map and leaves its neighbour's bits alone."""
    attention = probabilities(3, 2, 2, 4, 4)
    expected = whole_map(slug, Evidence(activation=attention, gradient=attention, grid=(2, 2)))
    broken = attention.clone()
    broken[0, 0, 1, 1] = bad

    result = whole_map(slug, Evidence(activation=broken, gradient=broken, grid=(2, 2)))

    assert not result[0].isfinite().all()
    assert expected[1].equal(result[1])


def test_no_gradient_gives_an_empty_map() -> None:
    """Where no key matters, none is drawn."""
    attention = probabilities(4, 1, 2, 4, 4)

    assert not whole_map("legrad", Evidence(activation=attention, gradient=0 * attention, grid=(2, 2))).any()


def test_torchcam_has_the_same_legrad() -> None:
    """Its class on torchvision's transformer, and our arithmetic on the attention it captured, layer score by layer score."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.VisionTransformer(
            image_size=12, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
        ).eval()
        torch.nn.init.normal_(net.heads.head.weight)
    with torchcam.methods.LeGrad(net, list(net.encoder.layers)) as library:
        net(torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)))
        captured = list(zip(library.hook_a, library.hook_attn, strict=True))
        layers = [
            Evidence(
                activation=attention.detach(),
                gradient=torch.autograd.grad(scores[:, 3].sum(), attention, retain_graph=True)[0],
                grid=(3, 3),
                prefix=1,
            )
            for scores, attention in captured
        ]
        (expected,) = library.compute_cams(3, normalized=False)

    result = whole_map("legrad", *layers)

    assert bool(expected.any())
    torch.testing.assert_close(expected, result)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import KernelPCA
from support.evidence import layer_map, random_pair
from torch import Tensor

from camserve.server.cam.methods import Evidence
from camserve.server.cam.methods.components import first_component, first_component_by_peak, first_kernel_component
from camserve.server.errors import Unsupported

SEEDS = st.integers(0, 2**31)
GATHERS = [first_component, first_component_by_peak, first_kernel_component]


def one_map(slug: str, activation: Tensor, gradient: Tensor | None = None) -> Tensor:
    """One method's map."""
    return layer_map(slug, Evidence(activation=activation, gradient=gradient))


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

    result = one_map("eigen-cam", activation).flatten()

    agreement = float((result * (cells.mean(dim=1) - cells.mean())).sum())
    assert agreement >= -1e-9 * float(values[0])
    if len(values) > 1 and values[1] > 0.95 * values[0]:
        return  # Nearly equal components: any mixture of them is as good a first one.
    torch.testing.assert_close(first.abs(), result.abs(), rtol=0, atol=1e-6 * float(values[0]) + 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_eigen_cam_scales_with_the_activation(scale: float) -> None:
    """Tiny and huge activations neither vanish nor overflow when they are squared."""
    activation = random_pair(1, 1, 5, 3, 3)[0].float()
    expected = one_map("eigen-cam", activation)

    result = one_map("eigen-cam", activation * scale)

    torch.testing.assert_close(expected, result / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("invert", [1.0, -1.0])
def test_eigen_cam_is_positive_where_the_activation_is_high(invert: float) -> None:
    """A bright blob is positive although the component alone has no sign; on a dark blob it is the surroundings."""
    blob = torch.zeros(1, 4, 5, 5)
    blob[:, :, 1:3, 1:3] = torch.tensor([1.0, 2.0, 0.5, 3.0])[None, :, None, None]

    result = one_map("eigen-cam", invert * blob)

    assert (blob[:, 0] > 0).equal(invert * result > 0)


def test_eigen_cam_keeps_a_broken_row_to_itself() -> None:
    """NaN in one row makes that row's map NaN and leaves the bits of the others alone."""
    activation = random_pair(2, 3, 4, 3, 3)[0]
    expected = one_map("eigen-cam", activation)
    activation[1, 2, 0, 0] = torch.nan

    result = one_map("eigen-cam", activation)

    assert result[1].isnan().all()
    assert expected[[0, 2]].equal(result[[0, 2]])


@given(seed=SEEDS, height=st.integers(1, 5), width=st.integers(2, 5), channels=st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_kpca_cam_is_that_of_scikit_learn(seed: int, height: int, width: int, channels: int) -> None:
    """The sigmoid kernel at scikit-learn's own gamma and offset, up to the sign that we define."""
    activation = random_pair(seed, 1, channels, height, width)[1]
    cells = activation[0].flatten(1).T
    kernel_pca = KernelPCA(n_components=2, kernel="sigmoid", eigen_solver="dense")
    centred = (cells - cells.mean(dim=0)).numpy()
    expected = torch.from_numpy(kernel_pca.fit_transform(centred))[:, 0]
    values = kernel_pca.eigenvalues_

    result = one_map("kpca-cam", activation).flatten()

    assert float((result * (cells.mean(dim=1) - cells.mean())).sum()) >= -1e-9
    if values[0] < 1e-9 or values[1] > 0.95 * values[0]:
        return  # No component, or two that are equally good.
    torch.testing.assert_close(expected.abs(), result.abs(), rtol=0, atol=1e-6)


def test_kpca_cam_refuses_layers_whose_kernel_would_be_too_large() -> None:
    """The message says how many cells there are, how many may be, and what to do."""
    with pytest.raises(
        Unsupported, match=r"at most 1600 cells; this one has 1681: choose a deeper layer, or eigen-cam"
    ):
        one_map("kpca-cam", torch.zeros(1, 2, 41, 41))


def test_seg_eigen_cam_is_positive_where_its_peak_is() -> None:
    """The cell of largest magnitude is positive, although gradient and activation are negative there."""
    activation, gradient = random_pair(3, 4, 5, 6, 6)
    activation[:, :, 2, 3] = -50.0

    result = one_map("seg-eigen-cam", activation, gradient)

    assert [2 * 6 + 3] * 4 == result.flatten(1).abs().argmax(dim=1).tolist()
    assert (result[:, 2, 3] > 0).all()
    torch.testing.assert_close(one_map("eigen-cam", gradient.abs() * activation).abs(), result.abs())


def test_eigen_grad_cam_is_eigen_cam_of_the_product() -> None:
    """Gradient times activation takes the activation's place, in the sign's rule too."""
    activation, gradient = random_pair(4, 2, 5, 3, 3)

    assert one_map("eigen-cam", gradient * activation).equal(one_map("eigen-grad-cam", activation, gradient))


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (7,), (2, 2, 2)])
def test_a_constant_layer_has_no_component(gather, value: float, shape: tuple[int, ...]) -> None:
    """Cells that do not differ have no direction in common: zero everywhere, also for a single cell, and never NaN."""
    result = gather(torch.full((2, 3, *shape), value))

    assert (2, *shape) == result.shape
    torch.testing.assert_close(torch.zeros_like(result), result, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gather", GATHERS)
def test_a_broken_row_is_nan_alone(gather) -> None:
    """NaN or infinity in one row leaves the bits of the others alone."""
    products = random_pair(5, 3, 4, 3, 3)[1]
    expected = gather(products)
    products[0, 1, 0, 0] = torch.inf
    products[2, 2, 0, 0] = torch.nan

    result = gather(products)

    assert result[[0, 2]].isnan().all()
    assert expected[1].equal(result[1])


@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (1, 40, 2, 2), (1, 3, 9), (2, 2, 3, 3, 3)])
def test_any_products_have_a_first_component(shape: tuple[int, ...]) -> None:
    """Eigen smoothing takes what any method weighs: one channel, many, signed, in one to three axes."""
    products = random_pair(6, *shape)[1]
    cells = products.flatten(2).transpose(1, 2)
    expected = torch.linalg.svdvals(cells - cells.mean(dim=1, keepdim=True))[:, 0]

    torch.testing.assert_close(expected, first_component(products).flatten(1).norm(dim=1))

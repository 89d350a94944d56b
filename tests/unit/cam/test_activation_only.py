import pytest
import torch
from support.evidence import layer_map, random_pair

from camserve.server.cam.methods import METHODS, Evidence
from camserve.server.jobs import Parameters, Profile

# One cell of eight stands out: mean 1, deviation sqrt(7), threshold 1 + 2 sqrt(7) < 8.
SPIKE = torch.tensor([[[8.0, 0, 0, 0, 0, 0, 0, 0]]])


def test_fem_marks_what_stands_out_with_the_mean() -> None:
    """The paper adds up binary maps worth each channel's mean; pytorch-grad-cam weighs the channel itself by their share."""
    evidence = Evidence(activation=torch.cat([SPIKE, -2 * SPIKE], dim=1))

    assert [[1.0, 0, 0, 0, 0, 0, 0, 0]] == layer_map("fem", evidence).tolist()
    assert [[1.0, 0, 0, 0, 0, 0, 0, 0]] == layer_map("fem", evidence, Profile.PYTORCH_GRAD_CAM).tolist()


def test_fem_counts_a_spike_by_its_channels_mean_however_high_it_is() -> None:
    """Two channels of the same mean count the same, whatever stands out in them."""
    evidence = Evidence(activation=torch.cat([SPIKE, SPIKE.roll(1) / 2 + 0.5], dim=1))

    assert [[1.0, 1.0, 0, 0, 0, 0, 0, 0]] == layer_map("fem", evidence).tolist()


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_fem_ignores_channels_where_nothing_stands_out(value: float) -> None:
    """A constant channel reaches its own threshold everywhere, and adds nothing all the same."""
    evidence = Evidence(activation=torch.cat([SPIKE, torch.full_like(SPIKE, value)], dim=1))

    assert [[1.0, 0, 0, 0, 0, 0, 0, 0]] == layer_map("fem", evidence).tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_fem_does_not_hide_what_is_not_finite(bad: float) -> None:
    """The row's map is NaN; its neighbour's has the bits it has alone."""
    activation = random_pair(0, 2, 3, 4, 4)[0]
    expected = layer_map("fem", Evidence(activation=activation[1:]))
    activation[0, 1, 2, 2] = bad

    result = layer_map("fem", Evidence(activation=activation))

    assert not result[0].isfinite().any()
    assert expected[0].equal(result[1])


def test_random_cam_weighs_every_row_alike() -> None:
    """The weights depend on the seed alone: not on the batch, not on the values."""
    activation = random_pair(1, 3, 5, 2, 2)[0]
    evidence = Evidence(activation=activation, parameters=Parameters(seed=4))

    together = layer_map("random-cam", evidence)
    alone = layer_map("random-cam", Evidence(activation=activation[2:], parameters=Parameters(seed=4)))
    other = layer_map("random-cam", Evidence(activation=activation, parameters=Parameters(seed=5)))

    assert together[2:].equal(alone)
    assert not together.allclose(other)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63)])
def test_random_weights_lie_evenly_between_minus_one_and_one(seed: int) -> None:
    """Any seed a request can carry."""
    weigh = METHODS["random-cam"].arithmetic.weigh
    weights = weigh(Evidence(activation=torch.ones(1, 10_000, 1), parameters=Parameters(seed=seed)))

    assert -1 <= float(weights.min()) < -0.99
    assert 0.99 < float(weights.max()) < 1
    assert abs(float(weights.mean())) < 0.03

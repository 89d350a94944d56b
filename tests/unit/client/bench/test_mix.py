from __future__ import annotations

import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.client import Spec
from camserve.client.bench import Mix, input_bytes, kind
from camserve.client.inputs import TensorInput
from camserve.v1 import explanation_service_pb2, spec_pb2


def _read(message: bytes) -> explanation_service_pb2.ExplainRequest:
    return explanation_service_pb2.ExplainRequest.FromString(message)


def test_a_draw_is_a_whole_request() -> None:
    """Kind and input, laid end to end, read as the message that a client would have sent."""
    made = kind("surface", [Spec("grad-cam", layers=["layer2"]), "eigen-cam"], lane="bulk", deadline=0.25)
    mix = Mix(kinds=(made,), inputs=(input_bytes(TensorInput([[1.0]])),))

    request = _read(next(mix.draws(0)).message)

    assert ("surface", 250) == (request.model, request.deadline.ToMilliseconds())
    assert [spec_pb2.METHOD_GRAD_CAM, spec_pb2.METHOD_EIGEN_CAM] == [spec.method for spec in request.specs]
    assert [1, 1] == list(request.tensor.shape)
    assert explanation_service_pb2.LANE_BULK == request.lane
    assert "grad-cam, eigen-cam" == made.name


@given(st.integers(0, 2**32))
def test_a_seed_gives_the_same_draws(seed: int) -> None:
    """A run can be repeated."""
    mix = Mix(kinds=(kind("m", []), kind("m", ["cam"])), inputs=(b"", input_bytes(b"x")))

    assert list(itertools.islice(mix.draws(seed), 20)) == list(itertools.islice(mix.draws(seed), 20))


def test_kinds_are_drawn_by_weight_and_inputs_in_turn() -> None:
    """Three of four draws are of the kind with three quarters of the weight; every input is as frequent as the others."""
    mix = Mix(
        kinds=(kind("m", ["cam"], weight=3), kind("m", [], weight=1)),
        inputs=tuple(input_bytes(bytes([65 + index])) for index in range(4)),
    )

    drawn = list(itertools.islice(mix.draws(1), 4000))

    assert 3000 == pytest.approx(sum(draw.kind == 0 for draw in drawn), abs=150)
    counts = collections.Counter(_read(draw.message).image.data for draw in drawn)
    assert {1000} == set(counts.values())
    assert "prediction" == mix.kinds[1].name


def test_what_cannot_be_is_refused() -> None:
    """An unknown method, a weight of nothing, a mix without inputs."""
    with pytest.raises(ValueError, match="did you mean"):
        kind("m", ["grad-kam"])
    with pytest.raises(ValueError, match="weight is 0"):
        kind("m", [], weight=0)
    with pytest.raises(ValueError, match="at least one kind"):
        Mix(kinds=(), inputs=(b"",))

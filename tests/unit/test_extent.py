"""Fields of a message are counted as the parser would find them, before it does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camserve.server.errors import InvalidRequest, Reason
from camserve.server.oip.messages import ModelInferRequest
from camserve.server.wire.extent import check_extent
from camserve.v1 import explanation_service_pb2, spec_pb2

LARGE = 300_000
EXPLAIN = explanation_service_pb2.ExplainRequest


@pytest.mark.parametrize(
    "message",
    [
        EXPLAIN(image={"data": bytes(LARGE)}, specs=[spec_pb2.Spec(layers=["a"] * 50)] * 300),
        EXPLAIN(specs=[spec_pb2.Spec(target={"region": {"mask": {"shape": [1000, 1000], "data": b"J\0" * 500_000}}})]),
        ModelInferRequest(raw_input_contents=[b"*\0" * LARGE] * 16, parameters={}),
    ],
    ids=["image", "mask", "raw"],
)
def test_large_requests_pass(message):
    """What lies in bytes is nobody's field, whatever it looks like."""
    check_extent(message.SerializeToString(), message.DESCRIPTOR)


def test_packed_numbers_are_one_field():
    """As every client of proto3 sends them."""
    message = ModelInferRequest()
    message.inputs.add(name="input").contents.fp32_contents.extend([0.5] * LARGE)

    check_extent(message.SerializeToString(), message.DESCRIPTOR)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (EXPLAIN, b"\x4a\0" * LARGE),
        (EXPLAIN, EXPLAIN(labels={str(number): "" for number in range(30_000)}).SerializeToString()),
        (EXPLAIN, EXPLAIN(specs=[spec_pb2.Spec(layers=[""] * LARGE)]).SerializeToString()),
        (ModelInferRequest, b"\x3a\0" * LARGE),
        (EXPLAIN, b"\x08\x01" * LARGE),
        (EXPLAIN, b"\x0d\0\0\0\0" * LARGE),
        (EXPLAIN, b"\x09" + bytes(8) + b"\x0b\x0c" * LARGE),
    ],
    ids=["submessages", "map", "nested", "bytes", "numbers", "fixed", "groups"],
)
def test_very_many_fields_are_refused(kind, message):
    """At any depth and of any type, also ones that the contract does not know."""
    with pytest.raises(InvalidRequest, match="more than 20000 fields") as caught:
        check_extent(message, kind.DESCRIPTOR)
    assert Reason.FIELD_INVALID is caught.value.reason


def test_small_messages_are_not_looked_at():
    """They become little, whatever they hold."""
    check_extent(b"\x4a\0" * 100_000, EXPLAIN.DESCRIPTOR)


@settings(max_examples=20)
@given(st.binary(max_size=60))
def test_malformed_messages_are_left_to_the_parser(start):
    """Cut short anywhere, lengths beyond the end, nesting without end: counted as far as it goes."""
    nested = b""
    for _ in range(120):
        nested = b"\x4a" + bytes([len(nested) & 0x7F]) + nested
    for message in (
        start + bytes(LARGE - 1),
        start + b"\x4a" + b"\xff" * LARGE,
        nested * 2000,
        start * (LARGE // (len(start) or 1)),
    ):
        try:
            check_extent(message, EXPLAIN.DESCRIPTOR)
        except InvalidRequest as error:
            assert "fields" in error.message  # noqa: PT017 - both ends are right

from __future__ import annotations

import pytest
from google.rpc import status_pb2

from camserve.client import Client, errors
from tests.unit.client.conftest import Peer, status


def test_a_refusal_arrives_with_everything_its_status_holds(peer: Peer, client: Client) -> None:
    """Code, reason, text, fields and variables survive the way through the trailing metadata."""
    peer.failures.append(
        status("NOT_FOUND", "LAYER_NOT_FOUND", "no layer 'x'; near: layer1", field="specs[0].layers", layer="x")
    )

    with pytest.raises(errors.NotFound) as raised:
        client.explain(b"image", model="surface")

    error = raised.value
    assert ("NOT_FOUND", "LAYER_NOT_FOUND", "no layer 'x'; near: layer1") == (error.code, error.reason, error.message)
    assert (errors.FieldViolation("specs[0].layers", "is wrong"),) == error.field_violations
    assert {"layer": "x"} == dict(error.metadata)
    assert "LAYER_NOT_FOUND: no layer 'x'; near: layer1; specs[0].layers: is wrong" == str(error)


def test_retry_info_gives_the_seconds_to_wait() -> None:
    """A full server says when to come back, in the text, too."""
    error = errors.from_status(status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "the queue is full", retry_after=1.5))

    assert isinstance(error, errors.Overloaded)
    assert 1.5 == error.retry_after
    assert "QUEUE_FULL: the queue is full (try again in 1.5 s)" == str(error)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", errors.InvalidRequest),
        ("NOT_FOUND", errors.NotFound),
        ("FAILED_PRECONDITION", errors.FailedPrecondition),
        ("UNIMPLEMENTED", errors.Unimplemented),
        ("RESOURCE_EXHAUSTED", errors.Overloaded),
        ("UNAVAILABLE", errors.Unavailable),
        ("DEADLINE_EXCEEDED", errors.DeadlineExceeded),
        ("CANCELLED", errors.Cancelled),
        ("UNAUTHENTICATED", errors.Unauthenticated),
        ("PERMISSION_DENIED", errors.PermissionDenied),
        ("INTERNAL", errors.Internal),
        ("UNKNOWN", errors.Internal),
    ],
)
def test_each_code_has_its_class(code: str, kind: type[errors.CamserveError]) -> None:
    """Callers catch what they can handle."""
    assert kind is type(errors.from_status(status(code, "INTERNAL", "text")))


def test_failures_of_grpc_itself_say_what_to_do() -> None:
    """Without a camserve behind the address there is no reason, but there is advice."""
    with Client("localhost:1", retries=0) as client, pytest.raises(errors.Unavailable) as raised:
        client.models()

    assert "" == raised.value.reason
    assert "is a server running at this address?" in str(raised.value)


def test_only_what_can_pass_by_itself_is_temporary() -> None:
    """A row that exhausts the device's memory will do so again."""
    temporary = {
        code: errors.from_status(status_pb2.Status(code=number)).is_temporary
        for code, number in (("INVALID_ARGUMENT", 3), ("RESOURCE_EXHAUSTED", 8), ("INTERNAL", 13), ("UNAVAILABLE", 14))
    }
    out_of_memory = errors.from_status(status("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "too large for the device"))

    assert {
        "INVALID_ARGUMENT": False, "RESOURCE_EXHAUSTED": True, "INTERNAL": False, "UNAVAILABLE": True
    } == temporary  # fmt: skip
    assert not out_of_memory.is_temporary


def test_a_message_too_large_for_grpc_is_the_requests_fault_and_not_retried(peer: Peer, client: Client) -> None:
    """It is RESOURCE_EXHAUSTED to gRPC, which would invite retries that cannot succeed."""
    with pytest.raises(errors.InvalidRequest) as raised:
        client.explain(bytes(65 * 1024 * 1024), model="surface")

    assert "MESSAGE_TOO_LARGE" == raised.value.reason
    assert [] == peer.requests

"""Nothing that the contract offers is left unbuilt: every method of explanation is in the table, and every call is answered."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import message_factory
from google.rpc import error_details_pb2, status_pb2

from camserve.server.cam.methods import METHODS
from camserve.server.wire import words
from camserve.v1 import explanation_service_pb2, model_service_pb2

CALLS = [
    method
    for file in (explanation_service_pb2, model_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def test_every_method_is_in_the_table():
    """What the contract has a number for can be asked for."""
    assert set(words.METHODS.values()) == set(METHODS)


@pytest.mark.parametrize("method", CALLS, ids=lambda method: method.full_name)
def test_every_call_is_answered(demo_server, method):
    """An empty request is answered or refused for what it lacks, never for want of an implementation."""
    call = f"/{method.containing_service.full_name}/{method.name}"
    with grpc.insecure_channel(demo_server.target) as channel:
        ask = channel.unary_stream(call) if method.server_streaming else channel.unary_unary(call)
        empty = message_factory.GetMessageClass(method.input_type)().SerializeToString()
        if not method.input_type.fields:
            assert ask(empty, timeout=60)
            return
        with pytest.raises(grpc.RpcError) as caught:
            list(ask(empty, timeout=60))

    assert grpc.StatusCode.INVALID_ARGUMENT is caught.value.code()
    status = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
    assert "FIELD_INVALID" == error_details_pb2.ErrorInfo.FromString(status.details[0].value).reason

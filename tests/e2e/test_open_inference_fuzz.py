"""Drawn requests of the Open Inference Protocol to a real server: each ends with a documented status; the next is answered."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from support import oip
from support.nets import TinyNet
from support.oip_requests import requests
from support.servers import Metrics, script_source
from support.servers import settings as server_settings

from camserve.server.background import BackgroundServer

# What docs/open-inference.md lists, without what only a fault of ours or of the model would give.
CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Iterator[str]:
    """A server with a small model, left with nobody inside."""
    source = script_source("tiny", TinyNet(), tmp_path_factory.mktemp("models"))
    with BackgroundServer(server_settings(), [source]) as server:
        yield server.target
        assert 0 == Metrics(server).value("camserve_requests_in_flight")


@settings(max_examples=60)
@given(made=requests())
def test_drawn_requests_are_answered_or_refused(target, made):
    """In one reply or on a stream; what the two say agrees."""
    with grpc.insecure_channel(target) as channel:
        stub = oip.Stub(channel)
        asked = oip.message("ModelInferRequest").FromString(made.SerializeToString())
        code = grpc.StatusCode.OK
        try:
            stub.ModelInfer(asked)
        except grpc.RpcError as error:
            code = error.code()
        replies = list(stub.ModelStreamInfer(iter([asked])))
        fine = oip.request("tiny", {"input": np.zeros((3, 32, 32), "float32")})
        assert 2 == len(stub.ModelInfer(fine).outputs)

    assert code in {grpc.StatusCode.OK, *CODES}
    assert replies
    if "timeout" not in made.parameters:
        assert (code is not grpc.StatusCode.OK) == any(reply.error_message for reply in replies)
    finals = [oip.plain(reply.infer_response.parameters)["triton_final_response"] for reply in replies]
    assert [*[False] * (len(replies) - 1), True] == finals

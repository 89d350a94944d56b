"""All that the contract offers and this version does not do yet, each asked of a real server.

Methods that the table lacks, and the calls listed here. The answer is UNIMPLEMENTED with the field's path, never a map.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from support.nets import TinyNet
from support.servers import script_source, settings

from camserve.server.background import BackgroundServer
from camserve.server.cam.methods import METHODS
from camserve.server.wire import words
from camserve.v1 import (
    explanation_service_pb2,
    explanation_service_pb2_grpc,
    input_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    spec_pb2,
)

UNBUILT_METHODS = [slug for slug in words.METHODS.values() if slug not in METHODS]
UNBUILT_RPCS = {
    "LoadModel": model_service_pb2.LoadModelRequest(model="tiny"),
    "UnloadModel": model_service_pb2.UnloadModelRequest(model="tiny"),
}


@pytest.fixture(scope="module")
def channel(tmp_path_factory) -> Iterator[grpc.Channel]:
    """A server with TinyNet."""
    folder: Path = tmp_path_factory.mktemp("models")
    with (
        BackgroundServer(settings(), [script_source("tiny", TinyNet(), folder)]) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        yield channel


def image() -> input_pb2.EncodedImage:
    """Any image."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    return input_pb2.EncodedImage(data=file.getvalue())


def explain(channel: grpc.Channel, request: explanation_service_pb2.ExplainRequest) -> list[str]:
    """The kinds of events of an answer."""
    stub = explanation_service_pb2_grpc.ExplanationServiceStub(channel)
    return [event.WhichOneof("event") for event in stub.Explain(request, timeout=60)]


def asked(channel: grpc.Channel) -> Iterator[tuple[str, str, str, object]]:
    """Every entry: its kind, its name, the path to expect, and the call that asks for it."""
    numbers = words.inverse(words.METHODS)
    for slug in UNBUILT_METHODS:
        # The second spec: the first, which is right, must not be answered alone.
        specs = [spec_pb2.Spec(method=number) for number in (spec_pb2.METHOD_GRAD_CAM, numbers[slug])]
        request = explanation_service_pb2.ExplainRequest(model="tiny", image=image(), specs=specs)
        yield "METHOD_NOT_IMPLEMENTED", slug, "specs[1].method", lambda request=request: explain(channel, request)
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    for rpc, request in UNBUILT_RPCS.items():
        call = getattr(stub, rpc)
        yield "FEATURE_NOT_IMPLEMENTED", rpc, "", lambda call=call, request=request: call(request, timeout=60)


def test_what_is_not_built_yet_says_so(channel):
    """Each method that the table lacks, and each call, answers UNIMPLEMENTED at its field: no prediction, no map."""
    for reason, name, path, call in asked(channel):
        with pytest.raises(grpc.RpcError) as caught:
            call()

        assert grpc.StatusCode.UNIMPLEMENTED is caught.value.code(), name
        trailers = dict(caught.value.trailing_metadata())
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        (info,) = (error_details_pb2.ErrorInfo.FromString(detail.value) for detail in status.details)
        assert (reason, name, path) == (
            info.reason,
            info.metadata.get("method", "") or info.metadata["feature"],
            info.metadata.get("field", ""),
        )

    plain = explanation_service_pb2.ExplainRequest(
        model="tiny", image=image(), specs=[spec_pb2.Spec(method=spec_pb2.METHOD_GRAD_CAM)]
    )
    assert ["prediction", "heatmap", "summary"] == explain(channel, plain)

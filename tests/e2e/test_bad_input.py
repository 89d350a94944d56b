"""What bad input gets: a clear status, the field, what is allowed; the server goes on and no other request is touched."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from support.nets import FailsOnBrightRows, NotFinite, TinyNet
from support.servers import script_source

from camserve.client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Kth,
    NotFound,
    Overloaded,
    Spec,
    TensorInput,
    TopK,
)
from camserve.v1 import explanation_service_pb2, explanation_service_pb2_grpc, input_pb2, spec_pb2


@pytest.fixture
def stub(demo_server) -> Iterator[explanation_service_pb2_grpc.ExplanationServiceStub]:
    """The bare stub, for messages that the client library refuses to send."""
    with grpc.insecure_channel(demo_server.target) as channel:
        yield explanation_service_pb2_grpc.ExplanationServiceStub(channel)


def png(width: int, height: int, **options: object) -> bytes:
    """A PNG file of that size, mostly compressed away."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG", **options)
    return file.getvalue()


def gif() -> bytes:
    """An animated GIF."""
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def jpeg(samples: list[Path]) -> bytes:
    """A sound JPEG file."""
    return samples[0].read_bytes()


BAD_IMAGES = {
    "text": (lambda _: b"this is not an image at all, whatever its name says", "IMAGE_UNDECODABLE"),
    "truncated": (lambda samples: jpeg(samples)[: len(jpeg(samples)) // 2], "IMAGE_UNDECODABLE"),
    "corrupt": (lambda samples: jpeg(samples)[:200] + bytes(500), "IMAGE_UNDECODABLE"),
    "100 megapixels": (lambda _: png(10_000, 10_000), "IMAGE_TOO_LARGE"),
    "animated": (lambda _: gif(), "IMAGE_UNDECODABLE"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image(client, samples, name):
    """Bytes that are no sound image are refused as the image's fault, and the next request works."""
    make, reason = BAD_IMAGES[name]

    with pytest.raises(InvalidRequest) as caught:
        client.explain(make(samples), model="surface", specs=["grad-cam"])

    assert reason == caught.value.reason
    assert ["image"] == [violation.field.split(".")[0] for violation in caught.value.field_violations]
    assert client.explain(samples[0], model="surface").prediction.label


GOOD = np.zeros((3, 160, 160), np.float32)
NAN = np.full((3, 160, 160), np.nan, np.float32)
BAD_TENSORS = {
    "shape": (TensorInput(GOOD[:, :100]), "TENSOR_MISMATCH"),
    "rank": (TensorInput(GOOD[None]), "TENSOR_MISMATCH"),
    "NaN": (TensorInput(NAN), "INPUT_NOT_FINITE"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensor(client, name):
    """A tensor that is not the model's input is refused; the text tells the input's shape."""
    tensor, reason = BAD_TENSORS[name]

    with pytest.raises(InvalidRequest) as caught:
        client.explain(tensor, model="surface")

    assert reason == caught.value.reason


MALFORMED = {
    "no bytes": ({"image": input_pb2.EncodedImage()}, "IMAGE_UNDECODABLE"),
    "no input": ({}, "FIELD_INVALID"),
    "too few bytes": (
        {"tensor": input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=(3, 160, 160), data=bytes(12))},
        "TENSOR_MISMATCH",
    ),
    "no dtype": ({"tensor": input_pb2.Tensor(shape=(3, 160, 160), data=GOOD.tobytes())}, "FIELD_INVALID"),
    "short stride": (
        {"frame": input_pb2.RawFrame(pixel_format=3, width_pixels=8, height_pixels=8, stride_bytes=7, data=bytes(999))},
        "FIELD_INVALID",
    ),
    "no frame size": ({"frame": input_pb2.RawFrame(pixel_format=3, data=bytes(999))}, "FIELD_INVALID"),
    "no method": ({"image": input_pb2.EncodedImage(data=b"x"), "specs": [spec_pb2.Spec()]}, "FIELD_INVALID"),
    "unknown method": (
        {"image": input_pb2.EncodedImage(data=b"x"), "specs": [spec_pb2.Spec(method=999)]},
        "FIELD_INVALID",
    ),
    "opacity": (
        {"image": input_pb2.EncodedImage(data=b"x"), "specs": [spec_pb2.Spec(method=2, overlay_opacity=2.0)]},
        "FIELD_INVALID",
    ),
    "request id": ({"image": input_pb2.EncodedImage(data=b"x"), "request_id": "\n"}, "FIELD_INVALID"),
    "overlay of a tensor": (
        {
            "tensor": input_pb2.Tensor(data_type=1, shape=(3, 160, 160), data=GOOD.tobytes()),
            "specs": [spec_pb2.Spec(method=2, encoding=spec_pb2.ENCODING_OVERLAY_PNG)],
        },
        "FIELD_INVALID",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_message(stub, name):
    """What no client library would send is refused with INVALID_ARGUMENT, one ErrorInfo and the field's path."""
    fields, reason = MALFORMED[name]

    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Explain(explanation_service_pb2.ExplainRequest(model="surface", **fields)))

    status = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert grpc.StatusCode.INVALID_ARGUMENT == caught.value.code()
    assert [True] == [detail.Unpack(info) for detail in infos]
    assert (reason, "camserve") == (info.reason, info.domain)
    assert [True] == [detail.Unpack(request) for detail in status.details if detail.Is(request.DESCRIPTOR)]
    assert request.field_violations[0].field


BAD_SPECS = {
    "layer": (Spec("grad-cam", layers=["layer9"]), NotFound, "LAYER_NOT_FOUND", "layer4"),
    "label": (Spec("grad-cam", target="dent"), NotFound, "LABEL_NOT_FOUND", "scratch"),
    "class": (Spec("grad-cam", target=5), InvalidRequest, "CLASS_OUT_OF_RANGE", "0 to 4"),
    "negative class": (Spec("grad-cam", target=-1), InvalidRequest, "CLASS_OUT_OF_RANGE", "0 to 4"),
    "k": (Spec("grad-cam", target=Kth(6)), InvalidRequest, "CLASS_OUT_OF_RANGE", "1 to 5"),
    "top k": (Spec("grad-cam", target=TopK(6)), InvalidRequest, "CLASS_OUT_OF_RANGE", "1 to 5"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_spec(client, samples, name):
    """A spec the model cannot carry out is refused before decoding, and the text says what is allowed."""
    spec, kind, reason, allowed = BAD_SPECS[name]

    with pytest.raises(kind) as caught:
        client.explain(samples[0], model="surface", specs=["grad-cam", spec])

    assert reason == caught.value.reason
    assert allowed in str(caught.value)
    assert "specs[1]" in (str(caught.value.metadata) + str(caught.value.field_violations))


def test_unknown_model_and_version(client, samples):
    """Unknown names list the known ones."""
    with pytest.raises(NotFound, match="surface") as no_model:
        client.explain(samples[0], model="surfaces")
    with pytest.raises(NotFound, match="it has: 1") as no_version:
        client.explain(samples[0], model="surface", version="7")

    assert ("MODEL_NOT_FOUND", "VERSION_NOT_FOUND") == (no_model.value.reason, no_version.value.reason)


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_k_above_class_count(client, samples, top_k):
    """The prediction cannot list more classes than there are."""
    with pytest.raises(InvalidRequest, match="1 to 5"):
        client.explain(samples[0], model="surface", top_k=top_k)


def test_thousand_specs(client, samples):
    """A request may not ask for a thousand explanations."""
    with pytest.raises(InvalidRequest, match="32") as caught:
        client.explain(samples[0], model="surface", specs=["grad-cam"] * 1000)

    assert "TOO_MANY_SPECS" == caught.value.reason


def test_deadline_already_past(stub, samples):
    """A deadline that is over on arrival is answered at once, with our reason."""
    request = explanation_service_pb2.ExplainRequest(
        model="surface",
        image=input_pb2.EncodedImage(data=samples[0].read_bytes()),
        deadline=duration_pb2.Duration(seconds=-1),
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Explain(request))

    assert grpc.StatusCode.DEADLINE_EXCEEDED == caught.value.code()


def test_own_deadline_is_answered_with_a_reason(client, samples):
    """The request's own deadline gives DEADLINE_EXCEEDED with our reason while gRPC's is far off."""
    with pytest.raises(DeadlineExceeded) as caught:
        client.explain(samples[0], model="surface", specs=["grad-cam"] * 30, deadline=1e-4)

    assert "DEADLINE_EXCEEDED" == caught.value.reason


async def test_bad_image_in_a_batch_fails_alone(demo_server, samples):
    """Of eight requests at once the corrupt one fails and seven are answered."""
    images: list[bytes | Path] = [samples[0]] * 7
    images.insert(3, b"corrupt")
    async with AsyncClient(demo_server.target) as client:
        results = await asyncio.gather(
            *(client.explain(image, model="surface", specs=["grad-cam"]) for image in images), return_exceptions=True
        )

    assert [3] == [place for place, result in enumerate(results) if isinstance(result, Exception)]


@pytest.mark.parametrize("net", [FailsOnBrightRows, NotFinite])
def test_bad_row_fails_alone(serve, tmp_path, net):
    """A row on which the model raises, or gives NaN, fails by itself; the rows that shared its pass are answered."""
    server = serve(script_source("moody", net(), tmp_path), batch_window_seconds=0.2)
    rows = [np.zeros((3, 32, 32), np.float32) for _ in range(8)]
    rows[5] += 3

    async def run():
        async with AsyncClient(server.target) as client:
            return await asyncio.gather(
                *(client.explain(TensorInput(row), model="moody", specs=["grad-cam"]) for row in rows),
                return_exceptions=True,
            )

    results = asyncio.run(run())

    assert [5] == [place for place, result in enumerate(results) if isinstance(result, Exception)]
    assert isinstance(results[5], Internal)
    assert "MODEL_FAILED" == results[5].reason


def test_full_door_refuses_with_a_time(serve, tmp_path, samples):
    """A full server says when to come back, at once."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), max_requests=1, batch_window_seconds=0.0)
    with Client(server.target, retries=0) as client:
        first = client.stream(np.zeros((64, 64, 3), np.uint8), model="tiny", specs=["grad-cam"] * 30)
        server.app._door._inside += 1  # Somebody sits in the only place.
        with pytest.raises(Overloaded) as caught:
            client.explain(np.zeros((64, 64, 3), np.uint8), model="tiny")
        server.app._door._inside -= 1
        assert len(list(first)) == 32

    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0

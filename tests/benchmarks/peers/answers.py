"""How a server is asked: one JPEG out, one `Answer` back, over the protocol each server speaks natively.

An `Ask` belongs to one event loop and may have many questions under way; `load.py` drives it. Adapters keep connections open and
do as little as they can: the driver shares the machine with the server it measures.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from camserve.client import AsyncClient, NotFound, Spec, Unavailable
from camserve.server.oip.messages import ModelInferRequest, ModelInferResponse

MODEL = "resnet50"
_BOUNDARY = b"camserve-peers"
# A peer may hold a request in its queue for long; nobody is to fail for that.
_PATIENCE_SECONDS = 600.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for one image.

    Attributes:
        class_index: the best class.
        heatmap: (h w), whatever its scale; empty when only the prediction was asked for.
    """

    class_index: int
    heatmap: npt.NDArray[Any]


Ask: TypeAlias = Callable[[bytes], Awaitable[Answer]]


class NotReady(Exception):
    """The server is not there yet, or its model is not."""


class Refused(Exception):
    """The server answered with an error."""


@asynccontextmanager
async def camserve(port: int, *, explains: bool) -> AsyncIterator[Ask]:
    """Camserve through its own client, with Grad-CAM at the card's default layer or without any explanation."""
    specs = [Spec("grad-cam")] if explains else []
    async with AsyncClient(f"127.0.0.1:{port}", timeout=_PATIENCE_SECONDS, retries=0) as client:

        async def ask(jpeg: bytes) -> Answer:
            try:
                result = await client.explain(jpeg, model=MODEL, specs=specs)
                result.raise_for_errors()
            except (Unavailable, NotFound) as error:
                raise NotReady(str(error)) from error
            heatmap = result.heatmaps[0].values if explains else np.empty((0, 0))
            return Answer(class_index=result.prediction.class_index, heatmap=heatmap)

        yield ask


@asynccontextmanager
async def http(port: int, *, path: str, is_upload: bool) -> AsyncIterator[Ask]:
    """HTTP/1.1 over as many kept connections as there are questions under way.

    Args:
        port: on 127.0.0.1.
        path: such as "/predict".
        is_upload: whether the JPEG travels as the file of a form; otherwise it is the body.
    """
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(jpeg: bytes) -> Answer:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                # A server ends connections that were idle for some seconds, as those of other callers are between loads.
                while idle and idle[-1][0].at_eof():
                    idle.pop()[1].close()
                reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port, limit=2**20)
                writer.write(_post(path, jpeg, is_upload=is_upload))
                status, body = await _reply(reader)
        except (OSError, EOFError) as error:
            raise NotReady(str(error)) from error
        idle.append((reader, writer))
        if status != 200:
            told = f"HTTP {status}: {body[:300]!r}"
            # Ray's proxy is there before the route is.
            raise NotReady(told) if status in {404, 503} else Refused(told)
        return parse(body)

    try:
        yield ask
    finally:
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()


@asynccontextmanager
async def open_inference(port: int) -> AsyncIterator[Ask]:
    """The Open Inference Protocol over gRPC."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )

        async def ask(jpeg: bytes) -> Answer:
            tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "contents": {"bytes_contents": [jpeg]}}
            request = ModelInferRequest(model_name=MODEL, inputs=[tensor])
            try:
                reply = await infer(request, timeout=_PATIENCE_SECONDS)
            except grpc.aio.AioRpcError as error:
                told = f"{error.code().name}: {error.details()}"
                # MLServer says NOT_FOUND, or INVALID_ARGUMENT, of a model that it has not loaded yet.
                raise NotReady(told) from error
            return parse(reply.outputs[0].contents.bytes_contents[0])

        yield ask


def parse(body: bytes) -> Answer:
    """Reads a peer's answer: a line of JSON, then the map as uint8."""
    line, _, pixels = body.partition(b"\n")
    told = json.loads(line)
    return Answer(class_index=told["classes"][0], heatmap=np.frombuffer(pixels, np.uint8).reshape(told["shape"]))


def _post(path: str, jpeg: bytes, *, is_upload: bool) -> bytes:
    kind = b"image/jpeg"
    if is_upload:
        kind = b"multipart/form-data; boundary=" + _BOUNDARY
        head = b'Content-Disposition: form-data; name="image"; filename="image.jpg"\r\nContent-Type: image/jpeg'
        jpeg = b"--%b\r\n%b\r\n\r\n%b\r\n--%b--\r\n" % (_BOUNDARY, head, jpeg, _BOUNDARY)
    return b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (
        path.encode(),
        kind,
        len(jpeg),
        jpeg,
    )


async def _reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    status = int(head[0].split()[1])
    if fields.get("transfer-encoding", "").lower() == "chunked":
        return status, await _chunks(reader)  # Ray's proxy, until its route is there.
    return status, await reader.readexactly(int(fields["content-length"]))


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    while (await reader.readline()).strip():
        pass  # Trailers.
    return body

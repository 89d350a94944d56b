"""Asks a server everything with KServe's gRPC client, and prints what came back as JSON.

python calls.py TARGET IMAGE TENSOR: as the script beside tritonclient's. What `InferenceGRPCClient` has no method for is asked
with the stub that it brings. Runs in build/clients/kserve, where nothing of camserve is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest, InferResponse
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import RequestedOutput

TARGET, IMAGE, TENSOR = sys.argv[1:]
MODEL = "surface"


def image() -> InferInput:
    """The file as it is, in a tensor of bytes."""
    found = InferInput("image", [1], "BYTES")
    found.set_data_from_numpy(np.array([Path(IMAGE).read_bytes()], np.object_))
    return found


def tensor(*, is_raw: bool = True) -> InferInput:
    """A row as the network takes it, as raw bytes or as a list of numbers."""
    values = np.load(TENSOR)
    found = InferInput("input", list(values.shape), "FP32")
    found.set_data_from_numpy(values, binary_data=is_raw)
    return found


def request(given: InferInput, *outputs: RequestedOutput, model: str = MODEL, **more: object) -> InferRequest:
    """A request for one input."""
    return InferRequest(model, [given], request_outputs=list(outputs), **more)


SEVERAL = (
    RequestedOutput("probabilities"),
    RequestedOutput("heatmap:0", {"method": "grad-cam"}),
    RequestedOutput("heatmap:1", {"method": "layercam", "layer": "layer2", "target": "scratch"}),
)


def plain(parameters: object) -> dict[str, object]:
    """Parameters by name, whichever field they are in; None for those of a kind that KServe's messages do not know."""
    found = {name: value.WhichOneof("parameter_choice") for name, value in sorted((parameters or {}).items())}
    return {name: kind and getattr(parameters[name], kind) for name, kind in found.items()}


def told(response: InferResponse) -> dict[str, object]:
    """An answer as JSON has it."""
    outputs = {}
    for output in response.outputs:
        values = output.as_numpy()
        if output.datatype == "BYTES":
            values = np.char.decode(values.astype(np.bytes_))
        outputs[output.name] = {
            "datatype": output.datatype,
            "shape": list(values.shape),
            "values": values.ravel().tolist(),
            "parameters": plain(output.parameters),
        }
    return {
        "model": response.model_name,
        "version": response.model_version,
        "id": response.id,
        "parameters": plain(response.parameters),
        "outputs": outputs,
    }


async def answered(client: InferenceGRPCClient, asked: InferRequest) -> dict[str, object]:
    """What came back or how it was refused."""
    try:
        return told(await client.infer(asked))
    except grpc.RpcError as error:
        return {"status": str(error.code()), "message": error.details()}


async def main() -> dict[str, object]:
    """Everything."""
    logging.disable()  # The client logs what it raises.
    found: dict[str, object] = {}
    async with InferenceGRPCClient(TARGET) as client:
        found["live"] = await client.is_server_live()
        found["ready"] = await client.is_server_ready()
        found["model ready"] = await client.is_model_ready(MODEL)
        found["unknown ready"] = await client.is_model_ready("nobody")
        found["predicted"] = await answered(client, request(tensor(), request_id="part-4711"))
        found["numbers"] = await answered(client, request(tensor(is_raw=False)))
        found["image"] = await answered(client, request(image(), RequestedOutput("heatmap")))
        found["one"] = await answered(client, request(tensor(), RequestedOutput("heatmap:layercam")))
        found["several"] = await answered(client, request(tensor(), *SEVERAL))
        defaults = {"explain.method": "layercam", "explain.layer": "layer2", "explain.target": "scratch"}
        found["defaults"] = await answered(client, request(tensor(), RequestedOutput("heatmap"), parameters=defaults))
        found["refused"] = {
            "model": await answered(client, request(tensor(), model="nobody")),
            "version": await answered(client, request(tensor(), model_version="7")),
            "output": await answered(client, request(tensor(), RequestedOutput("no-such-output"))),
            "layer": await answered(client, request(tensor(), RequestedOutput("heatmap", {"layer": "layer9"}))),
            "parameter": await answered(client, request(tensor(), RequestedOutput("heatmap", {"colour": "red"}))),
        }
    async with grpc.aio.insecure_channel(TARGET) as channel:
        stub = GRPCInferenceServiceStub(channel)
        server = await stub.ServerMetadata(messages.ServerMetadataRequest())
        found["server"] = {"name": server.name, "version": server.version, "extensions": list(server.extensions)}
        model = await stub.ModelMetadata(messages.ModelMetadataRequest(name=MODEL))
        found["metadata"] = {
            "name": model.name,
            "versions": list(model.versions),
            "inputs": {one.name: [one.datatype, list(one.shape)] for one in model.inputs},
            "outputs": {one.name: [one.datatype, list(one.shape)] for one in model.outputs},
        }
        unloaded = await stub.RepositoryModelUnload(messages.RepositoryModelUnloadRequest(model_name="spare"))
        found["unloaded"] = [unloaded.model_name, unloaded.isUnloaded]
        found["spare unloaded"] = (await stub.ModelReady(messages.ModelReadyRequest(name="spare"))).ready
        loaded = await stub.RepositoryModelLoad(messages.RepositoryModelLoadRequest(model_name="spare"))
        found["loaded"] = [loaded.model_name, loaded.isLoaded]
        found["spare loaded"] = (await stub.ModelReady(messages.ModelReadyRequest(name="spare"))).ready
    return found


print(json.dumps(asyncio.run(main())))

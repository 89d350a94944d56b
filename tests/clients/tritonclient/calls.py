"""Asks a server everything with NVIDIA's client of Triton, blocking and with asyncio, and prints what came back as JSON.

python calls.py TARGET IMAGE TENSOR: of model "surface" the encoded IMAGE and the float32 TENSOR in a .npy file are predicted and
explained; model "spare" is unloaded and loaded. Runs in build/clients/tritonclient, where nothing of camserve is.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

TARGET, IMAGE, TENSOR = sys.argv[1:]
MODEL = "surface"


def image() -> list:
    """The file as it is, in a tensor of bytes."""
    found = triton.InferInput("image", [1], "BYTES")
    found.set_data_from_numpy(np.array([Path(IMAGE).read_bytes()], np.object_))
    return [found]


def tensor(rows: int = 1) -> list:
    """A row as the network takes it, so many times."""
    values = np.load(TENSOR).repeat(rows, axis=0)
    found = triton.InferInput("input", list(values.shape), "FP32")
    found.set_data_from_numpy(values)
    return [found]


def requested(name: str, **parameters: str | int | bool) -> triton.InferRequestedOutput:
    """An output with parameters, which the class itself has no argument for."""
    output = triton.InferRequestedOutput(name)
    for key, value in parameters.items():
        field = {str: "string_param", bool: "bool_param", int: "int64_param"}[type(value)]
        setattr(output._get_tensor().parameters[key], field, value)
    return output


SEVERAL = [
    requested("probabilities"),
    requested("heatmap:0", method="grad-cam"),
    requested("heatmap:1", method="layercam", layer="layer2", target="scratch"),
]


def plain(parameters: object) -> dict[str, object]:
    """Parameters by name, whichever field they are in."""
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in sorted(parameters.items())}


def told(result: triton.InferResult) -> dict[str, object]:
    """An answer as JSON has it."""
    response = result.get_response()
    outputs = {}
    for output in response.outputs:
        values = result.as_numpy(output.name)
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


def refused(error: InferenceServerException) -> dict[str, object]:
    """A refusal as JSON has it."""
    return {"status": error.status(), "message": error.message()}


def tensors(described: object) -> dict[str, list]:
    """Data type and shape by name."""
    return {one.name: [one.datatype, list(one.shape)] for one in described}


async def answered(call) -> dict[str, object]:
    """What an awaited call gave or how it was refused."""
    try:
        return told(await call)
    except InferenceServerException as error:
        return refused(error)


REFUSED = {
    "model": {"model_name": "nobody", "inputs": tensor()},
    "version": {"model_name": MODEL, "inputs": tensor(), "model_version": "7"},
    "input": {"model_name": MODEL, "inputs": []},
    "output": {"model_name": MODEL, "inputs": tensor(), "outputs": [requested("no-such-output")]},
    "layer": {"model_name": MODEL, "inputs": tensor(), "outputs": [requested("heatmap", layer="layer9")]},
    "parameter": {"model_name": MODEL, "inputs": tensor(), "outputs": [requested("heatmap", colour="red")]},
    "shared memory": {
        "model_name": MODEL,
        "inputs": tensor(),
        "outputs": [requested("heatmap", shared_memory_region="m")],
    },
}


def blocking() -> dict[str, object]:
    """Everything with the blocking client."""
    found: dict[str, object] = {}
    with triton.InferenceServerClient(TARGET) as client:
        found["live"] = client.is_server_live()
        found["ready"] = client.is_server_ready()
        found["model ready"] = client.is_model_ready(MODEL)
        found["unknown ready"] = client.is_model_ready("nobody")
        server = client.get_server_metadata()
        found["server"] = {"name": server.name, "version": server.version, "extensions": list(server.extensions)}
        model = client.get_model_metadata(MODEL)
        found["metadata"] = {
            "name": model.name,
            "versions": list(model.versions),
            "inputs": tensors(model.inputs),
            "outputs": tensors(model.outputs),
        }
        config = client.get_model_config(MODEL).config
        found["config"] = {
            "name": config.name,
            "backend": config.backend,
            "max_batch_size": config.max_batch_size,
            "inputs": [one.name for one in config.input],
            "optional": [one.name for one in config.input if one.optional],
            "outputs": [one.name for one in config.output],
        }
        found["predicted"] = told(client.infer(MODEL, tensor(), request_id="part-4711"))
        found["image"] = told(client.infer(MODEL, image(), outputs=[triton.InferRequestedOutput("heatmap")]))
        found["one"] = told(
            client.infer(
                MODEL,
                tensor(),
                outputs=[triton.InferRequestedOutput("heatmap:layercam")],
                priority=1,
                timeout=60_000_000,
                compression_algorithm="gzip",
                headers={"x-line": "7"},
            )
        )
        found["batch"] = told(
            client.infer(
                MODEL,
                tensor(rows=3),
                outputs=[
                    triton.InferRequestedOutput("probabilities", class_count=2),
                    triton.InferRequestedOutput("heatmap:a"),
                    triton.InferRequestedOutput("heatmap:b"),
                ],
                parameters={"heatmap:b.method": "layercam", "heatmap:b.layer": "layer2", "heatmap:b.target": "scratch"},
            )
        )
        found["several"] = told(client.infer(MODEL, tensor(), outputs=SEVERAL))
        defaults = {"explain.method": "layercam", "explain.layer": "layer2", "explain.target": "scratch"}
        found["defaults"] = told(
            client.infer(MODEL, tensor(), outputs=[triton.InferRequestedOutput("heatmap")], parameters=defaults)
        )
        done: queue.Queue = queue.Queue()
        client.async_infer(MODEL, tensor(), lambda result, error: done.put((result, error)), outputs=SEVERAL)
        result, error = done.get(timeout=60)
        found["callback"] = told(result) if error is None else refused(error)
        found["refused"] = {}
        for name, asked in REFUSED.items():
            try:
                found["refused"][name] = told(client.infer(**asked))
            except InferenceServerException as error:
                found["refused"][name] = refused(error)

        found |= streams(client)
        found["repository"] = [states(client)]
        client.unload_model("spare")
        found["repository"].append(states(client))
        found["spare unloaded"] = client.is_model_ready("spare")
        try:
            client.load_model("spare", config='{"backend": "python"}')
        except InferenceServerException as error:
            found["refused"]["config"] = refused(error)
        client.load_model("spare")
        found["repository"].append(states(client))
        found["spare loaded"] = client.is_model_ready("spare")
        statistics = client.get_inference_statistics(MODEL).model_stats
        found["statistics"] = [
            [one.name, one.version, one.inference_stats.success.count > 0, one.execution_count > 0]
            for one in statistics
        ]
    return found


def streams(client: triton.InferenceServerClient) -> dict[str, object]:
    """Streams: answered, ended by an error, and left."""
    found: dict[str, object] = {}
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(MODEL, tensor(), request_id="first", outputs=SEVERAL)
    client.async_stream_infer("nobody", tensor(), request_id="lost")
    client.async_stream_infer(MODEL, tensor(), request_id="last", enable_empty_final_response=True)
    client.stop_stream()
    found["stream"] = [told(result) if error is None else refused(error) for result, error in iter_queue(answers)]

    client.start_stream(lambda result, error: answers.put((result, error)), headers={"triton_grpc_error": "true"})
    client.async_stream_infer("nobody", tensor())
    found["stream ended"] = refused(answers.get(timeout=60)[1])
    client.stop_stream()

    # The map takes many seconds; whoever has seen enough leaves.
    client.start_stream(lambda result, error: answers.put((result, error)))
    rise = {"explain.method": "rise", "explain.samples": 10_000}
    client.async_stream_infer(MODEL, tensor(), outputs=[triton.InferRequestedOutput("heatmap")], parameters=rise)
    found["before leaving"] = told(answers.get(timeout=60)[0])
    client.stop_stream(cancel_requests=True)
    found["left"] = refused(answers.get(timeout=60)[1])
    found["after leaving"] = told(client.infer(MODEL, tensor(), request_id="part-4711"))
    return found


def iter_queue(filled: queue.Queue) -> list:
    """What is in a queue to which nobody adds any more."""
    return [filled.get_nowait() for _ in range(filled.qsize())]


def states(client: triton.InferenceServerClient) -> dict[str, str]:
    """The state of each version of each model."""
    return {f"{one.name}/{one.version}": one.state for one in client.get_model_repository_index().models}


async def awaited() -> dict[str, object]:
    """The same questions with the asyncio client, as far as they are its own code."""
    found: dict[str, object] = {}
    async with triton_aio.InferenceServerClient(TARGET) as client:
        found["live"] = await client.is_server_live()
        found["ready"] = await client.is_server_ready()
        found["model ready"] = await client.is_model_ready(MODEL)
        found["predicted"] = await answered(client.infer(MODEL, tensor(), request_id="part-4711"))
        found["one"] = await answered(
            client.infer(MODEL, tensor(), outputs=[triton_aio.InferRequestedOutput("heatmap:layercam")])
        )
        found["several"] = await answered(client.infer(MODEL, tensor(), outputs=SEVERAL))
        found["refused"] = {name: await answered(client.infer(**asked)) for name, asked in REFUSED.items()}

        async def requests():
            yield {"model_name": MODEL, "inputs": tensor(), "request_id": "first", "outputs": SEVERAL}
            yield {"model_name": "nobody", "inputs": tensor(), "request_id": "lost"}

        found["stream"] = [
            told(result) if error is None else refused(error) async for result, error in client.stream_infer(requests())
        ]
    return found


print(json.dumps({"blocking": blocking(), "awaited": asyncio.run(awaited())}))

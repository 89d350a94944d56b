"""The Open Inference Protocol as a foreign client brings it: a second copy of its messages, in protobuf's default pool.

tritonclient and kserve register theirs there on import, under these very names. That this module and the server live in one
process is itself what a test would show.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from camserve.server.oip.messages import POOL, SERVICE

DATATYPES = {"float32": "FP32", "float16": "FP16", "float64": "FP64", "uint8": "UINT8", "int64": "INT64"}
_NUMPY = {theirs: ours for ours, theirs in DATATYPES.items()}


def _register() -> Any:
    """Our own file under the name that tritonclient's has, so that a test run needs neither of them."""
    file = descriptor_pb2.FileDescriptorProto()
    POOL.FindFileContainingSymbol(SERVICE).CopyToProto(file)
    file.name = "grpc_service.proto"
    pool = descriptor_pool.Default()
    pool.Add(file)
    return pool


_POOL = _register()


def message(name: str, /, **fields: Any) -> Any:
    """A message of the protocol, from the default pool."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))(**fields)


def parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as parameters, each in the field that tritonclient would take."""
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return {name: message("InferParameter", **{kinds[type(value)]: value}) for name, value in given.items()}


def raw(values: Any) -> bytes:
    """An array, or a list of files, as raw contents."""
    if isinstance(values, list):
        return b"".join(struct.pack("<I", len(file)) + file for file in values)
    return values.tobytes()


def request(
    model: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]] | Sequence[str] = (),
    *,
    typed: bool = False,
    **more: Any,
) -> Any:
    """A ModelInferRequest.

    Args:
        model: its name.
        inputs: arrays, or lists of image files, by name.
        outputs: parameters by output, or names alone.
        typed: whether to send typed contents rather than raw ones.
        more: `id`, `model_version`; `parameters` as plain values.
    """
    made = message(
        "ModelInferRequest", model_name=model, **{**more, "parameters": parameters(more.get("parameters", {}))}
    )
    for name, values in inputs.items():
        is_files = isinstance(values, list)
        datatype = "BYTES" if is_files else DATATYPES[values.dtype.name]
        given = made.inputs.add(name=name, datatype=datatype, shape=[len(values)] if is_files else values.shape)
        if not typed:
            made.raw_input_contents.append(raw(values))
        elif is_files:
            given.contents.bytes_contents.extend(values)
        else:
            field = {"FP32": "fp32_contents", "FP64": "fp64_contents", "UINT8": "uint_contents"}[datatype]
            getattr(given.contents, field).extend(values.reshape(-1).tolist())
    for name in outputs:
        options = outputs[name] if isinstance(outputs, Mapping) else {}
        made.outputs.add(name=name, parameters=parameters(options))
    return made


def arrays(response: Any) -> dict[str, Any]:
    """The outputs of a ModelInferResponse: arrays by name; BYTES as nested lists of bytes."""
    found = {}
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            files, place = [], 0
            while place < len(data):
                (length,) = struct.unpack_from("<I", data, place)
                files.append(data[place + 4 : place + 4 + length])
                place += 4 + length
            found[output.name] = np.array(files, object).reshape(tuple(output.shape)).tolist()
        else:
            found[output.name] = np.frombuffer(data, _NUMPY[output.datatype]).reshape(tuple(output.shape))
    return found


def facts(response: Any, name: str) -> dict[str, Any]:
    """The parameters of one output, as plain values."""
    (output,) = [output for output in response.outputs if output.name == name]
    return plain(output.parameters)


def plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as plain values."""
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in given.items()}


class Stub:
    """Calls of the service by name: `stub.ModelInfer(message)`."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._methods = _POOL.FindServiceByName(SERVICE).methods_by_name

    def __getattr__(self, name: str) -> Any:
        """One call."""
        method = self._methods[name]
        kind = "stream_stream" if method.client_streaming else "unary_unary"
        return getattr(self._channel, kind)(
            f"/{SERVICE}/{name}",
            lambda asked: asked.SerializeToString(),
            message_factory.GetMessageClass(method.output_type).FromString,
        )

"""What the Open Inference Protocol promises to its clients: names and numbers of fields, and an answer to every call."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest
from google.protobuf import message_factory
from support import oip

from camserve.server.oip.messages import POOL, SERVICE
from camserve.server.oip.unbuilt import UNBUILT

# As the protocol and Triton's extensions of it have them; a client's stored copy knows nothing else.
NUMBERS = {
    "ServerLiveResponse": {"live": 1},
    "ServerReadyResponse": {"ready": 1},
    "ModelReadyRequest": {"name": 1, "version": 2},
    "ModelReadyResponse": {"ready": 1},
    "ServerMetadataResponse": {"name": 1, "version": 2, "extensions": 3},
    "ModelMetadataRequest": {"name": 1, "version": 2},
    "ModelMetadataResponse": {"name": 1, "versions": 2, "platform": 3, "inputs": 4, "outputs": 5},
    "ModelMetadataResponse.TensorMetadata": {"name": 1, "datatype": 2, "shape": 3},
    "ModelInferRequest": {
        "model_name": 1,
        "model_version": 2,
        "id": 3,
        "parameters": 4,
        "inputs": 5,
        "outputs": 6,
        "raw_input_contents": 7,
    },
    "ModelInferRequest.InferInputTensor": {"name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5},
    "ModelInferRequest.InferRequestedOutputTensor": {"name": 1, "parameters": 2},
    "ModelInferResponse": {
        "model_name": 1,
        "model_version": 2,
        "id": 3,
        "parameters": 4,
        "outputs": 5,
        "raw_output_contents": 6,
    },
    "ModelInferResponse.InferOutputTensor": {"name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5},
    "InferParameter": {"bool_param": 1, "int64_param": 2, "string_param": 3, "double_param": 4, "uint64_param": 5},
    "InferTensorContents": {
        "bool_contents": 1,
        "int_contents": 2,
        "int64_contents": 3,
        "uint_contents": 4,
        "uint64_contents": 5,
        "fp32_contents": 6,
        "fp64_contents": 7,
        "bytes_contents": 8,
    },
    "ModelStreamInferResponse": {"error_message": 1, "infer_response": 2},
    "ModelConfigRequest": {"name": 1, "version": 2},
    "ModelConfigResponse": {"config": 1},
    "ModelConfig": {
        "name": 1,
        "platform": 2,
        "max_batch_size": 4,
        "input": 5,
        "output": 6,
        "dynamic_batching": 11,
        "backend": 17,
        "model_transaction_policy": 19,
    },
    "ModelInput": {"name": 1, "data_type": 2, "dims": 4, "optional": 8},
    "ModelOutput": {"name": 1, "data_type": 2, "dims": 3},
    "ModelStatisticsRequest": {"name": 1, "version": 2},
    "ModelStatisticsResponse": {"model_stats": 1},
    "ModelStatistics": {
        "name": 1,
        "version": 2,
        "last_inference": 3,
        "inference_count": 4,
        "execution_count": 5,
        "inference_stats": 6,
        "memory_usage": 8,
    },
    "InferStatistics": {
        "success": 1,
        "fail": 2,
        "queue": 3,
        "compute_input": 4,
        "compute_infer": 5,
        "compute_output": 6,
        "cache_hit": 7,
        "cache_miss": 8,
    },
    "StatisticDuration": {"count": 1, "ns": 2},
    "MemoryUsage": {"type": 1, "id": 2, "byte_size": 3},
    "RepositoryIndexRequest": {"repository_name": 1, "ready": 2},
    "RepositoryIndexResponse.ModelIndex": {"name": 1, "version": 2, "state": 3, "reason": 4},
    "RepositoryModelLoadRequest": {"repository_name": 1, "model_name": 2, "parameters": 3},
    "RepositoryModelUnloadRequest": {"repository_name": 1, "model_name": 2, "parameters": 3},
    "ModelRepositoryParameter": {"bool_param": 1, "int64_param": 2, "string_param": 3, "bytes_param": 4},
}
CALLS = list(POOL.FindServiceByName(SERVICE).methods)


@pytest.mark.parametrize("name", NUMBERS)
def test_fields_have_the_protocols_numbers(name):
    """A number that differs would be read as another field by every client."""
    fields = POOL.FindMessageTypeByName(f"inference.{name}").fields

    assert NUMBERS[name] == {field.name: field.number for field in fields}


def test_every_call_of_triton_is_there():
    """The standard's six and Triton's fourteen."""
    assert 20 == len(CALLS)
    assert ["ModelStreamInfer"] == [call.name for call in CALLS if call.client_streaming and call.server_streaming]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_every_call_is_answered(demo_server, call):
    """An empty request is answered, or refused for what it lacks; what is not built says so by its name."""
    empty = message_factory.GetMessageClass(call.input_type)().SerializeToString()
    path = f"/{SERVICE}/{call.name}"
    with grpc.insecure_channel(demo_server.target) as channel:
        if call.client_streaming:
            (reply,) = channel.stream_stream(path)(iter([empty]), timeout=60)
            assert "model_name is required" in oip.message("ModelStreamInferResponse").FromString(reply).error_message
            return
        try:
            channel.unary_unary(path)(empty, timeout=60)
            code, text = grpc.StatusCode.OK, ""
        except grpc.RpcError as error:
            code, text = error.code(), error.details()

    if call.name in UNBUILT:
        assert (grpc.StatusCode.UNIMPLEMENTED, True) == (code, call.name in text)
    elif code is not grpc.StatusCode.OK:
        assert (grpc.StatusCode.INVALID_ARGUMENT, True) == (code, "name is required" in text)


def test_the_default_pool_is_left_to_others():
    """After server and client are imported, protobuf's default pool knows nothing of the protocol."""
    program = (
        "import camserve.client, camserve.server.app\n"
        "from google.protobuf import descriptor_pool\n"
        "try:\n"
        "    descriptor_pool.Default().FindMessageTypeByName('inference.ModelInferRequest')\n"
        "except KeyError:\n"
        "    print('free')\n"
    )
    ran = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True, timeout=120
    )

    assert "free" == ran.stdout.strip()

"""The protocol's messages, made from descriptors in a pool of their own.

protobuf's default pool takes one definition of a name, and tritonclient's, kserve's or MLServer's may be there already. So there
are no generated modules: protos/generate_stubs.py writes the descriptors, and classes are made from them here. They carry no
types; Any is what the rest of this room sees.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = [
    "POOL",
    "SERVICE",
    "InferParameter",
    "ModelConfig",
    "ModelConfigResponse",
    "ModelInferRequest",
    "ModelInferResponse",
    "ModelMetadataResponse",
    "ModelReadyResponse",
    "ModelStatistics",
    "ModelStatisticsResponse",
    "ModelStreamInferResponse",
    "RepositoryIndexResponse",
    "RepositoryModelLoadResponse",
    "RepositoryModelUnloadResponse",
    "ServerLiveResponse",
    "ServerMetadataResponse",
    "ServerReadyResponse",
    "message_class",
]

_FILE: Final = "open_inference.binpb"


def _pool() -> Any:
    try:
        written = files(__package__).joinpath(_FILE).read_bytes()
    except FileNotFoundError as error:
        raise RuntimeError(f"{_FILE} is missing; it is generated: run `make stubs`") from error
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(written).file:
        pool.Add(file)
    return pool


POOL: Final = _pool()
SERVICE: Final = "inference.GRPCInferenceService"


def message_class(descriptor: Any) -> Any:
    """The class of a message."""
    return message_factory.GetMessageClass(descriptor)


def _named(name: str) -> Any:
    return message_class(POOL.FindMessageTypeByName(f"inference.{name}"))


InferParameter: Final = _named("InferParameter")
ModelConfig: Final = _named("ModelConfig")
ModelConfigResponse: Final = _named("ModelConfigResponse")
ModelInferRequest: Final = _named("ModelInferRequest")
ModelInferResponse: Final = _named("ModelInferResponse")
ModelMetadataResponse: Final = _named("ModelMetadataResponse")
ModelReadyResponse: Final = _named("ModelReadyResponse")
ModelStatistics: Final = _named("ModelStatistics")
ModelStatisticsResponse: Final = _named("ModelStatisticsResponse")
ModelStreamInferResponse: Final = _named("ModelStreamInferResponse")
RepositoryIndexResponse: Final = _named("RepositoryIndexResponse")
RepositoryModelLoadResponse: Final = _named("RepositoryModelLoadResponse")
RepositoryModelUnloadResponse: Final = _named("RepositoryModelUnloadResponse")
ServerLiveResponse: Final = _named("ServerLiveResponse")
ServerMetadataResponse: Final = _named("ServerMetadataResponse")
ServerReadyResponse: Final = _named("ServerReadyResponse")

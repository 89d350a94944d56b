"""Which role each rpc asks for: one table, held against every rpc that a real server answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support.credentials import key_entry
from support.rpcs import registered_rpcs
from support.servers import settings

from camserve.server.background import BackgroundServer

OIP = "/inference.GRPCInferenceService"
EXPLANATION, MODELS = "/camserve.v1.ExplanationService", "/camserve.v1.ModelService"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HEALTH = "/grpc.health.v1.Health"
ROLES = ("explain", "admin", "audit")

# rpc: who may call it. "-" is a caller without credentials.
MATRIX = {
    f"{EXPLANATION}/Explain": "explain",
    f"{MODELS}/ListModels": "explain",
    f"{MODELS}/GetModel": "explain",
    f"{MODELS}/LoadModel": "admin",
    f"{MODELS}/UnloadModel": "admin",
    f"{HEALTH}/Check": "- explain admin audit",
    f"{HEALTH}/Watch": "- explain admin audit",
    REFLECTION: "explain",
    f"{OIP}/ServerLive": "- explain admin audit",
    f"{OIP}/ServerReady": "- explain admin audit",
    f"{OIP}/ServerMetadata": "explain",
    f"{OIP}/ModelReady": "explain",
    f"{OIP}/ModelMetadata": "explain",
    f"{OIP}/ModelInfer": "explain",
    f"{OIP}/ModelStreamInfer": "explain",
    f"{OIP}/ModelConfig": "explain",
    f"{OIP}/ModelStatistics": "explain",
    f"{OIP}/RepositoryIndex": "explain",
    f"{OIP}/RepositoryModelLoad": "admin",
    f"{OIP}/RepositoryModelUnload": "admin",
    f"{OIP}/SystemSharedMemoryStatus": "admin",
    f"{OIP}/SystemSharedMemoryRegister": "admin",
    f"{OIP}/SystemSharedMemoryUnregister": "admin",
    f"{OIP}/CudaSharedMemoryStatus": "admin",
    f"{OIP}/CudaSharedMemoryRegister": "admin",
    f"{OIP}/CudaSharedMemoryUnregister": "admin",
    f"{OIP}/TraceSetting": "admin",
    f"{OIP}/LogSettings": "admin",
}


@pytest.fixture(scope="module")
def keys() -> dict[str, tuple[str, str]]:
    """A key and its entry for each role, and for one with all of them."""
    return {role: key_entry(role, [role]) for role in ROLES} | {"all": key_entry("all", ROLES)}


@pytest.fixture(scope="module")
def rpcs() -> set[str]:
    """What the server answers; filled when it starts."""
    return set()


@pytest.fixture(scope="module")
def channel(keys, rpcs, tmp_path_factory) -> Iterator[grpc.Channel]:
    """Of a server that knows those callers, and serves no model: an empty request gets no further than it must."""
    path: Path = tmp_path_factory.mktemp("callers") / "callers.toml"
    path.write_text("\n".join(entry for _, entry in keys.values()))
    with registered_rpcs() as found, served(path) as server, grpc.insecure_channel(server.target) as opened:
        rpcs |= found
        yield opened


def served(path: Path) -> BackgroundServer:
    """A server with a file of callers."""
    return BackgroundServer(settings(callers=path), ())


def code_of(channel: grpc.Channel, rpc: str, key: str | None) -> grpc.StatusCode:
    """How a call with an empty message, or with none on rpcs that take a stream, begins to be answered."""
    metadata = () if key is None else (("x-api-key", key),)
    call = channel.stream_stream(rpc)(iter([b""]), metadata=metadata, timeout=60)
    try:
        next(call)
    except StopIteration:
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()
    call.cancel()
    return grpc.StatusCode.OK


def test_every_rpc_of_the_server_is_in_the_table(channel, rpcs):
    """And nothing else; one that is not is refused to everybody."""
    assert rpcs == set(MATRIX)


@pytest.mark.parametrize("rpc", MATRIX)
def test_each_rpc_is_for_its_roles(channel, keys, rpc):
    """Without credentials UNAUTHENTICATED, without the role PERMISSION_DENIED, else whatever the rpc answers."""
    refusals = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
    allowed = MATRIX[rpc].split()

    codes = {role: code_of(channel, rpc, keys[role][0]) for role in (*ROLES, "all")}
    codes["-"] = code_of(channel, rpc, None)

    for who, code in codes.items():
        if who in allowed or who == "all":
            assert code not in refusals, who
        else:
            expected = grpc.StatusCode.UNAUTHENTICATED if who == "-" else grpc.StatusCode.PERMISSION_DENIED
            assert expected is code, who

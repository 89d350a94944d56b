"""Which role each rpc asks for: the one place where that is said. `guard.py` reads it; what is not in it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from camserve.server.callers.caller import Role

__all__ = ["ROLE_OF"]

# None is for everybody: probes and balancers can carry no credentials.
_ASKED: Mapping[str, Mapping[Role | None, tuple[str, ...]]] = {
    "camserve.v1.ExplanationService": {Role.EXPLAIN: ("Explain",)},
    "camserve.v1.ModelService": {
        Role.EXPLAIN: ("ListModels", "GetModel"),
        Role.ADMIN: ("LoadModel", "UnloadModel"),
    },
    "inference.GRPCInferenceService": {
        None: ("ServerLive", "ServerReady"),
        Role.EXPLAIN: (
            "ServerMetadata",
            "ModelReady",
            "ModelMetadata",
            "ModelInfer",
            "ModelStreamInfer",
            "ModelConfig",
            "ModelStatistics",
            "RepositoryIndex",
        ),
        Role.ADMIN: (
            "RepositoryModelLoad",
            "RepositoryModelUnload",
            # Answered as not built; were they, they would change the server for everybody.
            "SystemSharedMemoryStatus",
            "SystemSharedMemoryRegister",
            "SystemSharedMemoryUnregister",
            "CudaSharedMemoryStatus",
            "CudaSharedMemoryRegister",
            "CudaSharedMemoryUnregister",
            "TraceSetting",
            "LogSettings",
        ),
    },
    # Names of models are told to those alone who may explain: see health_names.py.
    "grpc.health.v1.Health": {None: ("Check", "Watch", "List")},
    "grpc.reflection.v1alpha.ServerReflection": {Role.EXPLAIN: ("ServerReflectionInfo",)},
    "grpc.reflection.v1.ServerReflection": {Role.EXPLAIN: ("ServerReflectionInfo",)},
}

ROLE_OF: Mapping[str, Role | None] = MappingProxyType(
    {
        f"/{service}/{method}": role
        for service, methods in _ASKED.items()
        for role, names in methods.items()
        for method in names
    }
)

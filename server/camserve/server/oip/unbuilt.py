"""The calls of the protocol that this server does not answer, and what to do instead. For `registration.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from camserve.server.errors import Reason, Unsupported

__all__ = ["UNBUILT", "refusal"]

_NO_SHARED_MEMORY: Final = "nothing is read from or written to shared memory; send tensors in the request"
UNBUILT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "SystemSharedMemoryStatus": _NO_SHARED_MEMORY,
        "SystemSharedMemoryRegister": _NO_SHARED_MEMORY,
        "SystemSharedMemoryUnregister": _NO_SHARED_MEMORY,
        "CudaSharedMemoryStatus": _NO_SHARED_MEMORY,
        "CudaSharedMemoryRegister": _NO_SHARED_MEMORY,
        "CudaSharedMemoryUnregister": _NO_SHARED_MEMORY,
        "TraceSetting": "traces are set up at the start, by OpenTelemetry's environment variables",
        "LogSettings": "logs are set up at the start, by the settings log_level and log_format",
    }
)


def refusal(name: str) -> Callable[[Any, Any], Awaitable[Any]]:
    """What answers a call that is not built.

    Args:
        name: of the call, a key of UNBUILT.
    """

    async def refuse(_request: Any, _context: Any) -> Any:
        raise Unsupported(
            Reason.FEATURE_NOT_IMPLEMENTED,
            f"{name} is not built: {UNBUILT[name]}",
            metadata={"rpc": name, "why": UNBUILT[name]},
        )

    return refuse

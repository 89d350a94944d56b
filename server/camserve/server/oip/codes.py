"""The statuses that this protocol's clients expect where camserve's own differ; reasons and details stay as they are.

`interceptors.py` asks for every error of a call of this protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from google.rpc import code_pb2, status_pb2

from camserve.server.errors import Reason

__all__ = ["PREFIX", "as_expected"]

PREFIX: Final = "/inference."

# Triton refuses what finds no room with UNAVAILABLE, and its clients come back on that.
_CODES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        Reason.QUEUE_FULL: code_pb2.UNAVAILABLE,
        Reason.DEADLINE_UNREACHABLE: code_pb2.UNAVAILABLE,
        Reason.MODEL_MEMORY_EXHAUSTED: code_pb2.UNAVAILABLE,
    }
)


def as_expected(status: status_pb2.Status, reason: Reason) -> status_pb2.Status:
    """The status with the code that belongs to its reason in this protocol."""
    status.code = _CODES.get(reason, status.code)
    return status

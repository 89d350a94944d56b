"""What a caller is told of an error: any exception arrives, a google.rpc.Status leaves, and the call's record holds the same.

`interceptors.py` asks for every call, the Open Inference Protocol's streams for each of their requests. Codes differ between the
two protocols in one place, here; reasons and details do not.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import structlog
from google.rpc import code_pb2, status_pb2

from camserve.server.access import AccessRecord
from camserve.server.errors import CamserveError, ExecutionFailed, Reason
from camserve.server.wire.answers import status_of

__all__ = ["status_for"]

_log = structlog.get_logger("camserve.calls")
# gRPC limits trailers to 8 KiB by default; long names and lists must not turn a refusal into an INTERNAL.
_TRAILER_BYTES = 7000
_LONGEST_TEXTS = (1500, 600, 200, 60)
_OPEN_INFERENCE: Final = "/inference."
# Triton refuses what finds no room with UNAVAILABLE, and its clients come back on that.
_OPEN_INFERENCE_CODES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        Reason.QUEUE_FULL: code_pb2.UNAVAILABLE,
        Reason.DEADLINE_UNREACHABLE: code_pb2.UNAVAILABLE,
        Reason.MODEL_MEMORY_EXHAUSTED: code_pb2.UNAVAILABLE,
    }
)


def status_for(error: Exception, record: AccessRecord) -> status_pb2.Status:
    """What the caller is told of an error, noted in the record; what we did not expect is logged."""
    if not isinstance(error, CamserveError):
        _log.exception("unexpected error", rpc=record.rpc, request_id=record.request_id, exc_info=error)
        error = ExecutionFailed(
            Reason.INTERNAL,
            f"an internal error; the server's log tells more under request id {record.request_id or 'none'}",
            metadata={"requestId": record.request_id},
        )
    status = _within_trailers(error)
    if record.rpc.startswith(_OPEN_INFERENCE):
        status.code = _OPEN_INFERENCE_CODES.get(error.reason, status.code)
    record.code, record.reason, record.message = code_pb2.Code.Name(status.code), str(error.reason), status.message
    return status


def _within_trailers(error: CamserveError) -> status_pb2.Status:
    """The error's status, its texts shortened as far as the trailers demand; reason, field and structure always fit."""
    for longest in _LONGEST_TEXTS:
        status = status_of(_shortened(error, longest))
        # The message travels twice: percent-encoded for any client, and inside the details, which travel as base64.
        encoded_bytes = len(urllib.parse.quote(status.message)) + status.ByteSize() * 4 // 3
        if encoded_bytes <= _TRAILER_BYTES:
            break
    return status


def _shortened(error: CamserveError, longest: int) -> CamserveError:
    def cut(text: str) -> str:
        # Names that came by ways other than protobuf's may hold what UTF-8 cannot: a refusal must not fail over it.
        text = text.encode(errors="backslashreplace").decode()
        return text if len(text) <= longest else text[: longest - 2] + " …"

    return type(error)(
        error.reason,
        cut(error.message),
        field=cut(error.field),
        metadata={key: cut(value) for key, value in error.metadata.items()},
        retry_after_seconds=error.retry_after_seconds,
    )

"""What can go wrong, as a caller sees it: every failure is a `CamserveError` made from a google.rpc.Status.

The clients raise these; the status comes from the trailing metadata of a failed call, or from the error of a single spec.
`reason` is the stable code of `camserve.v1.ErrorReason`, `code` gRPC's; the text says what to do.

    CamserveError
    ├── InvalidRequest        the request is wrong; sending it again does not help
    │   └── InvalidInput      the picture could not even be sent; also a ValueError
    ├── NotFound              a model, version, layer or label that does not exist
    ├── FailedPrecondition    right in itself, but this model or layer cannot do it
    ├── Unimplemented         part of the interface, but this server does not offer it
    ├── Overloaded            no room now; `retry_after` says when to try again
    ├── Unavailable           no server there, draining, or the model is still loading
    ├── DeadlineExceeded      the time is over
    ├── Cancelled             the call was cancelled, or the client closed
    ├── Denied
    │   ├── Unauthenticated   the server does not know who calls: credentials are missing, wrong or over
    │   └── PermissionDenied  it knows, and this caller may not
    ├── CorruptPayload        a heatmap's bytes are not what their digest says
    └── Internal              a fault of the server, or of the model on this input
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY: Final = "grpc-status-details-bin"
# gRPC itself says this, with no details, when a message is over a limit; trying again cannot help.
_TOO_LARGE: Final = "message larger than max"


@dataclasses.dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request that is wrong.

    Attributes:
        field: its path, such as "specs[2].target.class_index".
        description: what is wrong with it.
    """

    field: str
    description: str


class CamserveError(Exception):
    """A failure with a reason.

    Attributes:
        code: name of the gRPC status code, such as "NOT_FOUND".
        reason: stable code, such as "LAYER_NOT_FOUND"; empty when the failure did not come from camserve.
        message: what happened.
        field_violations: the request's fields at fault.
        retry_after: seconds after which trying again makes sense, or None.
        metadata: every variable of the message, as strings.
    """

    advice = ""

    def __init__(
        self,
        code: str,
        reason: str,
        message: str,
        *,
        field_violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.field_violations = tuple(field_violations)
        self.retry_after = retry_after
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return False

    def __str__(self) -> str:
        text = self.message or self.code
        for violation in self.field_violations:
            if violation.description not in text:
                text += f"; {violation.field}: {violation.description}"
            elif violation.field not in text:
                text += f" (at {violation.field})"
        if self.retry_after is not None:
            text += f" (try again in {self.retry_after:.3g} s)"
        if self.advice and not self.reason:  # With a reason the server has already said what to do.
            text += f" ({self.advice})"
        return f"{self.reason or self.code}: {text}"


class InvalidRequest(CamserveError):
    """The request is wrong in itself; sending it again does not help."""

    advice = "correct the request"


class InvalidInput(InvalidRequest, ValueError):
    """The input could not be read or has a form that cannot be sent; raised before anything is sent."""


class NotFound(CamserveError):
    """What was named does not exist."""

    advice = "see what exists with client.models() and client.model(name)"


class FailedPrecondition(CamserveError):
    """The request is right, but this model or layer cannot do it."""

    advice = "choose another layer or method; client.model(name) tells which work"


class Unimplemented(CamserveError):
    """The method or option is part of the interface, but this server does not offer it."""

    advice = "the server does not offer this; is it a camserve of this version?"


class Overloaded(CamserveError):
    """No room now; try again after `retry_after` seconds."""

    advice = "send less at a time, or retry later"

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later: not if this row, or this model, is too much for the device's memory."""
        return self.reason not in {"OUT_OF_MEMORY", "MODEL_MEMORY_EXHAUSTED"}


class Unavailable(CamserveError):
    """No server there, or it is draining, or the model is not loaded yet."""

    advice = "is a server running at this address?"

    @property
    def is_temporary(self) -> bool:
        """Always true: servers come back."""
        return True


class DeadlineExceeded(CamserveError):
    """The time is over."""

    advice = "allow a longer timeout or ask for less"


class Cancelled(CamserveError):
    """The call was cancelled, or the client was closed."""


class Denied(CamserveError):
    """Credentials are missing or not sufficient."""

    advice = "check the credentials of this client"


class Unauthenticated(Denied):
    """The server does not know who calls: credentials are missing, wrong, expired or not valid yet."""

    advice = "give the client credentials: Credentials(api_key=…), or CAMSERVE_API_KEY"


class PermissionDenied(Denied):
    """The server knows who calls, and this caller may not do this."""

    advice = "whoever runs the server gives roles to callers"


class CorruptPayload(CamserveError):
    """A heatmap's bytes are not what the server says it sent."""


class Internal(CamserveError):
    """A fault of the server, or of the model on this input; the server's log holds the request id."""


_CLASSES: Final[Mapping[str, type[CamserveError]]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": FailedPrecondition,
    "UNIMPLEMENTED": Unimplemented,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
}
_CODE_NAMES: Final[Mapping[int, str]] = {code.value[0]: code.name for code in grpc.StatusCode}


def from_rpc_error(error: grpc.RpcError) -> CamserveError:
    """Returns the typed error of a failed call, sync or async."""
    code, text = error.code(), error.details() or ""
    # Pairs at run time for sync and async calls alike, which grpc's own annotations do not say.
    trailers = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())
    for key, value in trailers:
        if key == _DETAILS_KEY:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:  # A proxy mangled it; what gRPC itself says is still true.
                break
            return from_status(status)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in text:
        return InvalidRequest("INVALID_ARGUMENT", "MESSAGE_TOO_LARGE", f"{text}; send a smaller image")
    if code is grpc.StatusCode.CANCELLED:
        # Not by us: our own calls end as `closed`. gRPC says so for a server that stopped before it took the call.
        return Unavailable(
            "UNAVAILABLE", "", f"the call was ended before it was answered: {text or 'no reason was given'}"
        )
    return _CLASSES.get(code.name, Internal)(code.name, "", text)


def from_status(status: status_pb2.Status) -> CamserveError:
    """Returns the typed error of a status: that of a failed call, or of one spec."""
    reason, metadata, retry_after = "", {}, None
    violations: list[FieldViolation] = []
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [FieldViolation(item.field, item.description) for item in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    code = _CODE_NAMES.get(status.code, "UNKNOWN")
    return _CLASSES.get(code, Internal)(
        code, reason, status.message, field_violations=violations, retry_after=retry_after, metadata=metadata
    )


def closed() -> Cancelled:
    """Returns the error of a call that ended because its client was closed."""
    return Cancelled("CANCELLED", "CLIENT_CLOSED", "this client was closed; make a new one")

"""What can go wrong, said once: every refusal camserve makes is a `CamserveError` that knows its reason.

Any room raises these; `statuses.py` alone turns them into gRPC statuses. `reason` is the stable, machine-readable part
and has a twin in `camserve.v1.ErrorReason`; message text is for people and free to change.

    CamserveError
    ├── InvalidRequest        the request is wrong; sending it again does not help
    ├── NotFound              a model, version, layer or label that does not exist, or was unloaded
    ├── Unsupported           right in itself, but this model or this version of camserve cannot do it
    ├── Overloaded            no room now; `retry_after_seconds` says when to try again
    ├── Unavailable           draining or still loading
    ├── Unauthenticated       who calls is not known: credentials are missing, wrong or over
    ├── PermissionDenied      who calls is known, and may not
    ├── DeadlineExceeded      the caller's time is over, or cannot suffice
    └── ExecutionFailed       the model or a method failed on this row
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Mapping
from types import MappingProxyType

__all__ = [
    "CamserveError",
    "DeadlineExceeded",
    "ExecutionFailed",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "Reason",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "at_field",
]


class Reason(enum.StrEnum):
    """Stable reasons; each is `camserve.v1.ErrorReason` without its prefix."""

    FIELD_INVALID = "FIELD_INVALID"
    IMAGE_UNDECODABLE = "IMAGE_UNDECODABLE"
    IMAGE_TOO_LARGE = "IMAGE_TOO_LARGE"
    TENSOR_MISMATCH = "TENSOR_MISMATCH"
    INPUT_NOT_FINITE = "INPUT_NOT_FINITE"
    TOO_MANY_SPECS = "TOO_MANY_SPECS"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    VERSION_NOT_FOUND = "VERSION_NOT_FOUND"
    LAYER_NOT_FOUND = "LAYER_NOT_FOUND"
    LABEL_NOT_FOUND = "LABEL_NOT_FOUND"
    LAYER_UNUSABLE = "LAYER_UNUSABLE"
    CLASS_OUT_OF_RANGE = "CLASS_OUT_OF_RANGE"
    METHOD_NOT_IMPLEMENTED = "METHOD_NOT_IMPLEMENTED"
    FEATURE_NOT_IMPLEMENTED = "FEATURE_NOT_IMPLEMENTED"
    METHOD_UNSUPPORTED_BY_MODEL = "METHOD_UNSUPPORTED_BY_MODEL"
    TARGET_NOT_DIFFERENTIABLE = "TARGET_NOT_DIFFERENTIABLE"
    QUEUE_FULL = "QUEUE_FULL"
    DRAINING = "DRAINING"
    MODEL_NOT_READY = "MODEL_NOT_READY"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    MODEL_FAILED = "MODEL_FAILED"
    INTERNAL = "INTERNAL"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    MODEL_UNLOADED = "MODEL_UNLOADED"
    MODEL_LOAD_FAILED = "MODEL_LOAD_FAILED"
    REPOSITORY_MISSING = "REPOSITORY_MISSING"
    RULE_FAILED = "RULE_FAILED"
    MODEL_MEMORY_EXHAUSTED = "MODEL_MEMORY_EXHAUSTED"
    RATE_LIMITED = "RATE_LIMITED"
    TOO_MANY_CONCURRENT = "TOO_MANY_CONCURRENT"
    CREDENTIALS_MISSING = "CREDENTIALS_MISSING"
    CREDENTIALS_INVALID = "CREDENTIALS_INVALID"
    CREDENTIALS_EXPIRED = "CREDENTIALS_EXPIRED"
    CREDENTIALS_NOT_YET_VALID = "CREDENTIALS_NOT_YET_VALID"
    ROLE_MISSING = "ROLE_MISSING"


class CamserveError(Exception):
    """A failure with a reason.

    Attributes:
        reason: stable code.
        metadata: every variable of the message, keys in lowerCamelCase (AIP-193).
        field: path of the request field at fault, such as `specs[2].target.class_index`, or empty.
        retry_after_seconds: when trying again makes sense, or None.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str = "",
        metadata: Mapping[str, object] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata: Mapping[str, str] = MappingProxyType({k: str(v) for k, v in (metadata or {}).items()})
        self.retry_after_seconds = retry_after_seconds

    def at(self, field: str) -> CamserveError:
        """Returns the same error, placed at a request field: rooms that do not know the wire leave the path to the edge."""
        if not self.field:
            self.field = field
        return self


@contextlib.contextmanager
def at_field(field: str) -> Iterator[None]:
    """Places whatever is wrong inside a `with` block at a field of the request."""
    try:
        yield
    except CamserveError as error:
        error.at(field)
        raise


class InvalidRequest(CamserveError):
    """The request is wrong in itself."""


class NotFound(CamserveError):
    """What was named does not exist; the message lists what does."""


class Unsupported(CamserveError):
    """The request is right, but this model or this version of camserve cannot do it."""


class Overloaded(CamserveError):
    """No room now; try again after `retry_after_seconds`."""


class Unavailable(CamserveError):
    """The server or the model is not taking requests: draining, or not loaded yet."""


class Unauthenticated(CamserveError):
    """Who calls is not known. The text never holds what was sent."""


class PermissionDenied(CamserveError):
    """Who calls is known, and may not do this."""


class DeadlineExceeded(CamserveError):
    """The caller's time is over, or cannot suffice."""


class ExecutionFailed(CamserveError):
    """The model or a method failed on this row."""

"""Around every call: one access record, one log line, and the only place where an error becomes a gRPC status.

Covers unary and streaming answers alike; `app.py` gives it to the server. Cancellation passes through untouched: a handler that
swallows it leaks a stream in grpc.aio.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import structlog
from google.rpc import status_pb2

from camserve.server.access import AccessRecord, open_record
from camserve.server.errors import CamserveError, DeadlineExceeded, ExecutionFailed, Reason
from camserve.server.metrics import Metrics
from camserve.server.wire.answers import status_of

__all__ = ["CallInterceptor"]

_log = structlog.get_logger("camserve.calls")
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DETAILS_KEY = "grpc-status-details-bin"
# gRPC limits trailers to 8 KiB by default; long names and lists must not turn a refusal into an INTERNAL.
_TRAILER_BYTES = 7000
# By then a write to somebody who reads is long over.
_GRACE_SECONDS = 1.0
_LONGEST_TEXTS = (1500, 600, 200, 60)


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Records, logs and translates."""

    def __init__(self, metrics: Metrics, *, write_seconds: float) -> None:
        self._metrics = metrics
        self._write_seconds = write_seconds

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wraps the handler of a call that has one; health and reflection are wrapped too, so that they are logged."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        rpc = handler_call_details.method
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(rpc, handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(rpc, handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def _streaming(self, rpc: str, inner: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        async def call(request: Any, context: Any) -> None:
            record = self._open(rpc, context)
            try:
                answer = inner(request, context)
                if inspect.isasyncgen(answer):
                    # Closed here rather than by the garbage collector: a caller who left gives its place back at once.
                    async with contextlib.aclosing(answer) as messages:
                        await self._write_all(messages, record, context)
                else:
                    await answer  # The health service's Watch writes to the context instead of yielding.
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - every error needs a status
                await _end(error, record, context)
            finally:
                record.close(self._metrics)

        return call

    async def _write_all(self, messages: AsyncIterator[Any], record: AccessRecord, context: Any) -> None:
        """Sends what comes; written rather than yielded, so that who stops reading cannot hold a place for ever.

        The call's deadline ends a write only after a grace: a status behind a write that was cancelled never reaches the caller,
        and to one who reads a write takes no time. The next step then finds the deadline passed, and says so.

        Raises:
            DeadlineExceeded: flow control kept a message back well beyond the call's deadline, or longer than a reader may take.
        """
        try:
            # One timer, set for each message: a timeout of its own for each costs several times as much.
            async with asyncio.timeout(None) as patience:
                async for message in messages:
                    patience.reschedule(min(record.deadline + _GRACE_SECONDS, time.monotonic() + self._write_seconds))
                    await context.write(message)
                    patience.reschedule(None)
        except TimeoutError as error:
            if not patience.expired():
                raise
            raise DeadlineExceeded(
                Reason.DEADLINE_EXCEEDED,
                "the answer could not be sent in time because it was not read; read the stream as it comes",
            ) from error

    def _unary(self, rpc: str, inner: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            record = self._open(rpc, context)
            try:
                answer = inner(request, context)
                return await answer if asyncio.iscoroutine(answer) else answer
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - every error needs a status
                await _end(error, record, context)
            finally:
                record.close(self._metrics)

        return call

    def _open(self, rpc: str, context: Any) -> AccessRecord:
        record = AccessRecord(rpc=rpc, peer=context.peer())
        open_record(record)
        return record


async def _end(error: BaseException, record: AccessRecord, context: Any) -> NoReturn:
    """Ends a call with the status that belongs to an error."""
    if isinstance(error, asyncio.CancelledError):
        record.code = "CANCELLED"
        raise error
    if isinstance(error, grpc.aio.AbortError):
        record.code = context.code().name
        raise error
    if not isinstance(error, CamserveError):
        _log.exception("unexpected error", rpc=record.rpc, request_id=record.request_id, exc_info=error)
        error = ExecutionFailed(
            Reason.INTERNAL,
            f"an internal error; the server's log tells more under request id {record.request_id or 'none'}",
            metadata={"requestId": record.request_id},
        )
    status = _within_trailers(error)
    code = _CODES[status.code]
    record.code, record.reason, record.message = code.name, str(error.reason), status.message
    await context.abort(code, status.message, ((_DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("This is a bug: abort returned")


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
        return text if len(text) <= longest else text[: longest - 2] + " …"

    return type(error)(
        error.reason,
        cut(error.message),
        field=cut(error.field),
        metadata={key: cut(value) for key, value in error.metadata.items()},
        retry_after_seconds=error.retry_after_seconds,
    )

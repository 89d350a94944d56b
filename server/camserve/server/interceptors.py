"""Around every call: one access record, one log line, one span, and the only place where an error becomes a gRPC status.

Covers unary and streaming calls in both directions; `app.py` gives it to the server. Cancellation passes through untouched: a
handler that swallows it leaks a stream in grpc.aio. Handlers of streaming calls take messages from their iterator, which
reads them; `context.read` would give bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError

from camserve.server.access import AccessRecord, is_ordinary, open_record
from camserve.server.callers import Caller, Guard, current_caller, set_caller
from camserve.server.callers.turnstile import Turnstile
from camserve.server.errors import DeadlineExceeded, InvalidRequest, Reason
from camserve.server.metrics import Metrics
from camserve.server.reception import Reception
from camserve.server.statuses import status_for
from camserve.server.tracing import UNTRACED, Tracer
from camserve.server.wire.extent import check_extent

__all__ = ["CallInterceptor"]

_T = TypeVar("_T")
_Reader: TypeAlias = Callable[[bytes], Any]
# From what gRPC hands over, a stream of messages in bytes and the call's context, to what a handler takes.
_Taker: TypeAlias = Callable[[Any, Any], Awaitable[Any]]

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DETAILS_KEY = "grpc-status-details-bin"
# By then a write to somebody who reads is long over.
_GRACE_SECONDS = 1.0
# Calls that ask a model once each. A stream of requests is counted by its handler, one by one.
_REQUESTS = frozenset({"/camserve.v1.ExplanationService/Explain", "/inference.GRPCInferenceService/ModelInfer"})


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Records, logs, counts callers and translates."""

    def __init__(
        self,
        metrics: Metrics,
        turnstile: Turnstile,
        reception: Reception,
        *,
        guard: Guard,
        write_seconds: float,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self._metrics = metrics
        self._turnstile = turnstile
        self._reception = reception
        self._write_seconds = write_seconds
        self._guard = guard
        self._tracer = tracer

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wraps the handler of a call that has one; health and reflection are wrapped too, so that they are logged."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        rpc, read, write = handler_call_details.method, handler.request_deserializer, handler.response_serializer
        try:
            caller = self._guard.at_the_gate(rpc, handler_call_details.invocation_metadata or ())
        except Exception as refusal:  # noqa: BLE001 - who cannot be told is refused, with a status like every other error
            # As a stream, whatever the rpc is: gRPC then receives nothing of what is sent before it is refused.
            return grpc.stream_stream_rpc_method_handler(self._refusing(rpc, refusal))
        # Messages are read here and not by gRPC, which says UNKNOWN where one cannot be.
        take = functools.partial(_messages if handler.request_streaming else self._message, read=read, rpc=rpc)
        # On the wire a call of one message is a stream of one. As such its message is read when we say so, and not before.
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            return grpc.stream_stream_rpc_method_handler(self._streaming(rpc, caller, take, inner), None, write)
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        return grpc.stream_unary_rpc_method_handler(self._unary(rpc, caller, take, inner), None, write)

    async def _message(self, _sent: Any, context: Any, *, read: _Reader | None, rpc: str) -> Any:
        """The one message of a call."""
        message = await self._reception.take_in(current_caller().name, context.read)
        if message is grpc.aio.EOF:
            raise InvalidRequest(Reason.FIELD_INVALID, f"the call of {rpc} ended before a request arrived")
        return _read(message, read=read, rpc=rpc)

    def _refusing(self, rpc: str, refusal: Exception) -> Callable[..., Awaitable[None]]:
        async def answer(_sent: Any, _record: AccessRecord, _context: Any) -> None:
            raise refusal

        return self._around(rpc, answer)

    def _streaming(
        self, rpc: str, caller: Caller | None, take: _Taker, inner: Callable[..., Any]
    ) -> Callable[..., Awaitable[None]]:
        async def answer(sent: Any, record: AccessRecord, context: Any) -> None:
            messages = inner(await take(sent, context), context)
            if inspect.isasyncgen(messages):
                # Closed here rather than by the garbage collector: a caller who left gives its place back at once.
                async with contextlib.aclosing(messages):
                    await self._write_all(messages, record, context)
            else:
                await messages  # The health service's Watch writes to the context instead of yielding.

        return self._around(rpc, self._known(rpc, caller, answer))

    def _unary(
        self, rpc: str, caller: Caller | None, take: _Taker, inner: Callable[..., Any]
    ) -> Callable[..., Awaitable[Any]]:
        async def answer(sent: Any, _record: AccessRecord, context: Any) -> Any:
            given = inner(await take(sent, context), context)
            return await given if asyncio.iscoroutine(given) else given

        return self._around(rpc, self._known(rpc, caller, answer))

    def _known(
        self, rpc: str, caller: Caller | None, answer: Callable[[Any, AccessRecord, Any], Awaitable[_T]]
    ) -> Callable[[Any, AccessRecord, Any], Awaitable[_T]]:
        """The same, as a call of somebody who may call this; refused before its message is parsed."""
        answer = self._counted(answer) if rpc in _REQUESTS else answer

        async def known(sent: Any, record: AccessRecord, context: Any) -> _T:
            found = self._guard.inside(rpc, caller, peer=record.peer, connection=context.auth_context)
            set_caller(found)
            if found.how != "anonymous":
                record.caller = found.name
            given = answer(sent, record, context)
            del sent
            return await given

        return known

    def _around(
        self, rpc: str, answer: Callable[[Any, AccessRecord, Any], Awaitable[_T]]
    ) -> Callable[..., Awaitable[_T]]:
        tracer = self._tracer if is_ordinary(rpc) else UNTRACED

        async def call(sent: Any, context: Any) -> _T:
            trace = tracer.request(rpc, context.invocation_metadata() or ())
            record = AccessRecord(rpc=rpc, peer=context.peer(), trace=trace)
            open_record(record)
            try:
                given = answer(sent, record, context)
                del sent
                return await _ended(given, record, context)
            finally:
                record.close(self._metrics)

        return call

    def _counted(
        self, answer: Callable[[Any, AccessRecord, Any], Awaitable[_T]]
    ) -> Callable[[Any, AccessRecord, Any], Awaitable[_T]]:
        """The same, as one of its caller's requests; refused before its message is parsed."""

        async def counted(sent: Any, record: AccessRecord, context: Any) -> _T:
            with self._turnstile.request(current_caller().name):
                given = answer(sent, record, context)
                del sent
                return await given

        return counted

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


class _Messages:
    """What a caller streams, each message read as it is taken.

    No generator: a handler may end while one of its tasks still waits for the next message, and a generator that runs cannot be
    closed.
    """

    def __init__(self, sent: AsyncIterator[bytes], *, read: _Reader | None, rpc: str) -> None:
        self._sent = sent
        self._read = read
        self._rpc = rpc

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return _read(await anext(self._sent), read=self._read, rpc=self._rpc)


async def _messages(sent: AsyncIterator[bytes], _context: Any, *, read: _Reader | None, rpc: str) -> _Messages:
    return _Messages(sent, read=read, rpc=rpc)


def _read(message: bytes, *, read: _Reader | None, rpc: str) -> Any:
    if read is None:
        return message
    # A deserializer is the FromString of its message's class.
    check_extent(message, read.__self__.DESCRIPTOR)  # type: ignore[attr-defined]
    try:
        return read(message)
    except DecodeError as error:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{len(message)} bytes arrived that are no request of {rpc}: cut short, corrupt, or with text that is not UTF-8",
            metadata={"bytes": len(message), "rpc": rpc},
        ) from error


async def _ended(answer: Awaitable[_T], record: AccessRecord, context: Any) -> _T:
    """Awaits the answer; ends the call with the status that belongs to whatever comes in its place.

    gRPC keeps the error of a call that was aborted, with all frames and errors behind it, until the next full garbage collection.
    So the status is all that is left of the error when the call is aborted: a refused picture must not stay in memory.
    """
    try:
        return await answer
    except asyncio.CancelledError:
        record.code = "CANCELLED"
        raise
    except grpc.aio.AbortError:
        record.code = context.code().name
        raise
    except Exception as error:  # noqa: BLE001 - every error needs a status
        status = status_for(error, record)
    await context.abort(_CODES[status.code], status.message, ((_DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("This is a bug: abort returned")

"""The client for asyncio: `async with AsyncClient("localhost:50051") as client: await client.explain("part.png", …)`.

The sibling of `sync_client.py`, method for method; it belongs to the event loop in which it is first used. Cancelling the task
that awaits a call cancels the call on the server.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import random
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc
import grpc.aio

from camserve.client import channels, errors
from camserve.client.cards import ModelCard, ModelStatus, card_from_proto, status_from_proto
from camserve.client.credentials import ANONYMOUS, Credentials
from camserve.client.errors import CamserveError
from camserve.client.inputs import AnyInput, PreparedInput, prepare
from camserve.client.requests import RequestOptions, RequestPlan, SharedOptions, plan
from camserve.client.results import Event, Result, collect, event_from_proto
from camserve.client.retries import LOADING_SECONDS, RetryPolicy
from camserve.client.specs import AnySpec, Spec
from camserve.v1 import (
    explanation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)


class AsyncClient:
    """Talks to one camserve server, in one event loop.

    Attributes:
        target: address of the server, such as "localhost:50051".

    Args:
        target: address of the server.
        timeout: seconds for each call, retries included; None waits for ever.
        retries: how often a call is tried again that was refused before anything arrived because the server was full or away.
        credentials: who the client says it is and whom it trusts; None for a server that asks for nothing, in plain text.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = 30.0,
        retries: int = 3,
        credentials: Credentials | None = None,
    ) -> None:
        self.target = target
        self._timeout = timeout
        self._policy = RetryPolicy(retries=retries)
        self._credentials = credentials or ANONYMOUS
        self._channel: grpc.aio.Channel | None = None
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call under way with `Cancelled`, also those that wait for a retry. May be called twice."""
        self._ended.set()
        if self._channel is not None:
            await self._channel.close(grace=None)

    async def explain(
        self,
        image: AnyInput,
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        **options: Unpack[RequestOptions],
    ) -> Result:
        """Classifies one image and explains it; arguments, result and errors are those of `Client.explain`."""
        request_plan = plan(model, specs, self._timeout, **options)
        return await self._explain(await _prepare(image), request_plan)

    def stream(
        self,
        image: AnyInput,
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[Event]:
        """Explains one image and yields each event as it arrives: `Prediction`, then `Heatmap`s and `SpecError`s, `Summary`.

        Leaving the loop early cancels the call on the server: at once inside `contextlib.aclosing`, otherwise as soon as the
        event loop finalises the generator.
        """
        return self._stream(image, plan(model, specs, self._timeout, **options))

    @overload
    def explain_many(
        self,
        images: Iterable[AnyInput] | AsyncIterable[AnyInput],
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        concurrency: int = 8,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[SharedOptions],
    ) -> AsyncGenerator[Result]: ...

    @overload
    def explain_many(
        self,
        images: Iterable[AnyInput] | AsyncIterable[AnyInput],
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        concurrency: int = 8,
        on_error: Literal["return"],
        **options: Unpack[SharedOptions],
    ) -> AsyncGenerator[Result | CamserveError]: ...

    def explain_many(
        self,
        images: Iterable[AnyInput] | AsyncIterable[AnyInput],
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        concurrency: int = 8,
        on_error: Literal["raise", "return"] = "raise",
        **options: Unpack[SharedOptions],
    ) -> AsyncGenerator[Result | CamserveError]:
        """Explains many images and yields the results in their order; see `Client.explain_many`.

        The images may also come from an async iterable.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it is at least 1")
        if on_error not in {"raise", "return"}:
            raise ValueError(f"on_error is {on_error!r}; it is 'raise' or 'return'")
        if "request_id" in options:
            raise TypeError("many images cannot share one request_id; use labels to group them")
        return self._many(images, plan(model, specs, self._timeout, **options), concurrency, on_error)

    async def models(self) -> tuple[ModelStatus, ...]:
        """Returns every model and version the server knows, also those that failed to load."""
        request = model_service_pb2.ListModelsRequest()
        stub = model_service_pb2_grpc.ModelServiceStub(self._connected())
        response = await self._unary(stub.ListModels, request, self._timeout)
        return tuple(status_from_proto(status) for status in response.models)

    async def model(self, name: str, version: str | None = None) -> ModelCard:
        """Returns the card of one model; raises NotFound when there is none."""
        request = model_service_pb2.GetModelRequest(model=name, version=version)
        stub = model_service_pb2_grpc.ModelServiceStub(self._connected())
        response = await self._unary(stub.GetModel, request, self._timeout)
        return card_from_proto(response.card)

    async def load_model(
        self,
        name: str,
        version: str | None = None,
        *,
        timeout: float | None = LOADING_SECONDS,  # noqa: ASYNC109 - as in every other call of this client.
    ) -> ModelCard:
        """Lets the server load a model from its repository; see `Client.load_model`."""
        request = model_service_pb2.LoadModelRequest(model=name, version=version)
        stub = model_service_pb2_grpc.ModelServiceStub(self._connected())
        response = await self._unary(stub.LoadModel, request, timeout)
        return card_from_proto(response.card)

    async def unload_model(
        self,
        name: str,
        version: str | None = None,
        *,
        timeout: float | None = LOADING_SECONDS,  # noqa: ASYNC109 - as in every other call of this client.
    ) -> None:
        """Lets the server unload a model; see `Client.unload_model`."""
        request = model_service_pb2.UnloadModelRequest(model=name, version=version)
        stub = model_service_pb2_grpc.ModelServiceStub(self._connected())
        await self._unary(stub.UnloadModel, request, timeout)

    async def _many(
        self,
        images: Iterable[AnyInput] | AsyncIterable[AnyInput],
        request_plan: RequestPlan,
        concurrency: int,
        on_error: str,
    ) -> AsyncGenerator[Result | CamserveError]:
        pending: collections.deque[asyncio.Task[Result | CamserveError]] = collections.deque()
        room = asyncio.Semaphore(concurrency)

        async def answer(image: AnyInput) -> Result | CamserveError:
            async with room:
                try:
                    return await self._explain(await _prepare(image), request_plan)
                except CamserveError as error:
                    if on_error == "raise":
                        raise
                    return error

        try:
            async for image in _each(images):
                pending.append(asyncio.create_task(answer(image)))
                if len(pending) >= 2 * concurrency:
                    yield await pending.popleft()
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _stream(self, image: AnyInput, request_plan: RequestPlan) -> AsyncGenerator[Event]:
        events = self._events(await _prepare(image), request_plan)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def _explain(self, source: PreparedInput, request_plan: RequestPlan) -> Result:
        return collect([event async for event in self._events(source, request_plan)], source)

    async def _events(self, source: PreparedInput, request_plan: RequestPlan) -> AsyncGenerator[Event]:
        started = time.monotonic()
        for attempt in itertools.count(1):
            elapsed = time.monotonic() - started
            has_answered = False
            stub = explanation_service_pb2_grpc.ExplanationServiceStub(self._connected())
            call = stub.Explain(
                request_plan.request(source, elapsed),
                timeout=_left(request_plan.timeout_seconds, elapsed),
                metadata=self._credentials.metadata(),
            )
            try:
                async for response in call:
                    has_answered = True
                    event = event_from_proto(response, source)
                    if event is not None:
                        yield event
            except grpc.RpcError as error:
                failure = self._failure(error)
            except asyncio.CancelledError:
                # Closing the channel looks like this too; only a task that somebody cancelled may end as cancelled.
                if not self._ended.is_set() or _is_cancelled():
                    raise
                failure = errors.closed()
            else:
                return
            finally:
                call.cancel()
            if has_answered:
                raise failure
            await self._pause(failure, attempt, _left(request_plan.limit_seconds, time.monotonic() - started))

    async def _unary(self, rpc: Callable[..., Awaitable[Any]], request: Any, limit: float | None) -> Any:
        started = time.monotonic()
        for attempt in itertools.count(1):
            try:
                left = _left(limit, time.monotonic() - started)
                return await rpc(request, timeout=left, metadata=self._credentials.metadata())
            except grpc.RpcError as error:
                failure = self._failure(error)
            except asyncio.CancelledError:
                if not self._ended.is_set() or _is_cancelled():
                    raise
                failure = errors.closed()
            await self._pause(failure, attempt, _left(limit, time.monotonic() - started))
        raise AssertionError("count() never ends")

    async def _pause(self, failure: CamserveError, attempt: int, remaining: float | None) -> None:
        """Waits before a retry, or raises the failure when there should be none."""
        wait = self._policy.wait_seconds(
            failure,
            attempt=attempt,
            remaining_seconds=remaining,
            chance=random.random(),  # noqa: S311  # Jitter, no secret.
        )
        if wait is None:
            raise failure
        try:
            async with asyncio.timeout(wait):
                await self._ended.wait()
        except TimeoutError:
            return
        raise errors.closed() from failure

    def _connected(self) -> grpc.aio.Channel:
        """Returns the channel, made at the first use: it belongs to the running event loop."""
        if self._ended.is_set():
            raise errors.closed()
        if self._channel is None:
            options = channels.options_of(self._credentials)
            if self._credentials.uses_tls:
                trusted = self._credentials.channel_credentials()
                self._channel = grpc.aio.secure_channel(self.target, trusted, options)
            else:
                self._channel = grpc.aio.insecure_channel(self.target, options)
        return self._channel

    def _failure(self, error: grpc.RpcError) -> CamserveError:
        if self._ended.is_set() and error.code() is grpc.StatusCode.CANCELLED:
            return errors.closed()
        return errors.from_rpc_error(error)


async def _prepare(image: AnyInput) -> PreparedInput:
    """Reads an input in a thread: disks and PNG compression would hold up the loop."""
    return await asyncio.to_thread(prepare, image)


async def _each(images: Iterable[AnyInput] | AsyncIterable[AnyInput]) -> AsyncIterator[AnyInput]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _left(limit: float | None, elapsed: float) -> float | None:
    """Returns the seconds left of a limit, None when there is none."""
    return None if limit is None else max(limit - elapsed, 0.0)

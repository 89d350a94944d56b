"""The client for ordinary code: `with Client("localhost:50051") as client: client.explain("part.png", model="surface", …)`.

Each call builds a request, retries it while nothing has arrived and time is left, and turns responses into results. It may be
used from several threads at once. `async_client.py` is its sibling for asyncio.
"""

from __future__ import annotations

import collections
import functools
import itertools
import random
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from camserve.client import channels, errors
from camserve.client.cards import ModelCard, ModelStatus, card_from_proto, status_from_proto
from camserve.client.credentials import ANONYMOUS, Credentials
from camserve.client.errors import CamserveError
from camserve.client.inputs import AnyInput, PreparedInput, prepare
from camserve.client.lifetimes import Lifetime
from camserve.client.requests import RequestOptions, RequestPlan, SharedOptions, plan
from camserve.client.results import Event, Result, collect, event_from_proto
from camserve.client.retries import LOADING_SECONDS, RetryPolicy
from camserve.client.specs import AnySpec, Spec
from camserve.v1 import (
    explanation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)


class Client:
    """Talks to one camserve server.

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
        options = channels.options_of(self._credentials)
        if self._credentials.uses_tls:
            self._channel = grpc.secure_channel(target, self._credentials.channel_credentials(), options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._explanations = explanation_service_pb2_grpc.ExplanationServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._life = Lifetime()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call under way with `Cancelled`, also those that wait for a retry. May be called twice."""
        self._life.end()
        self._channel.close()

    def explain(
        self,
        image: AnyInput,
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        **options: Unpack[RequestOptions],
    ) -> Result:
        """Classifies one image and explains it.

        Args:
            image: a path, the bytes of an image file, a PIL image, an array or a TensorInput; see `inputs.prepare`.
            model: name of a model on the server.
            specs: the explanations to make, as `Spec`s or method names; none asks for the prediction only.
            **options: see `RequestOptions`.

        Returns:
            Everything that arrived; specs that could not be explained are in `errors`.

        Raises:
            CamserveError: when the request as a whole failed; see `camserve.client.errors`.
            ValueError: for a word that does not exist.
        """
        request_plan = plan(model, specs, self._timeout, **options)
        return self._explain(prepare(image), request_plan, self._life)

    def stream(
        self,
        image: AnyInput,
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        **options: Unpack[RequestOptions],
    ) -> Generator[Event]:
        """Explains one image and yields each event as it arrives: `Prediction`, then `Heatmap`s and `SpecError`s, `Summary`.

        Leaving the loop early cancels the call on the server. Arguments and errors are those of `explain`.
        """
        return self._events(prepare(image), plan(model, specs, self._timeout, **options), self._life)

    @overload
    def explain_many(
        self,
        images: Iterable[AnyInput],
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        concurrency: int = 8,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[SharedOptions],
    ) -> Generator[Result]: ...

    @overload
    def explain_many(
        self,
        images: Iterable[AnyInput],
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        concurrency: int = 8,
        on_error: Literal["return"],
        **options: Unpack[SharedOptions],
    ) -> Generator[Result | CamserveError]: ...

    def explain_many(
        self,
        images: Iterable[AnyInput],
        *,
        model: str,
        specs: Sequence[AnySpec] | str | Spec = (),
        concurrency: int = 8,
        on_error: Literal["raise", "return"] = "raise",
        **options: Unpack[SharedOptions],
    ) -> Generator[Result | CamserveError]:
        """Explains many images, several at a time, and yields the results in the order of the images.

        Images are taken from the iterable only as room comes free, so it may be endless; at most `2 * concurrency` of them and of
        their results are held. Leaving the loop early cancels what is under way.

        Args:
            images: see `explain`.
            model: name of a model on the server.
            specs: the explanations to make of each.
            concurrency: how many requests are under way at a time.
            on_error: "raise" ends with the first `CamserveError`; "return" yields it in the image's place and goes on.
            **options: see `SharedOptions`; `timeout` and `deadline` hold for each image.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it is at least 1")
        if on_error not in {"raise", "return"}:
            raise ValueError(f"on_error is {on_error!r}; it is 'raise' or 'return'")
        if "request_id" in options:
            raise TypeError("many images cannot share one request_id; use labels to group them")
        return self._many(iter(images), plan(model, specs, self._timeout, **options), concurrency, on_error)

    def models(self) -> tuple[ModelStatus, ...]:
        """Returns every model and version the server knows, also those that failed to load."""
        request = model_service_pb2.ListModelsRequest()
        response = self._unary(self._models.ListModels, request, self._timeout)
        return tuple(status_from_proto(status) for status in response.models)

    def model(self, name: str, version: str | None = None) -> ModelCard:
        """Returns the card of one model; raises NotFound when there is none."""
        request = model_service_pb2.GetModelRequest(model=name, version=version)
        response = self._unary(self._models.GetModel, request, self._timeout)
        return card_from_proto(response.card)

    def load_model(
        self, name: str, version: str | None = None, *, timeout: float | None = LOADING_SECONDS
    ) -> ModelCard:
        """Lets the server load a model from its repository, and returns when it serves.

        Until then, and if that fails, what served before serves on. A version that serves already is loaded anew if its files
        have changed. Leaving early does not stop the loading.

        Args:
            name: of the model.
            version: of the model, or a label; None applies the policy of its `model.toml` to what the repository holds now.
            timeout: seconds to wait; None waits for ever.

        Returns:
            The card; of several versions the newest one's.

        Raises:
            NotFound: the repository has no such model or version.
            FailedPrecondition: it could not be loaded; the text says why.
            Overloaded: models may take no more memory than they do.
        """
        request = model_service_pb2.LoadModelRequest(model=name, version=version)
        response = self._unary(self._models.LoadModel, request, timeout)
        return card_from_proto(response.card)

    def unload_model(self, name: str, version: str | None = None, *, timeout: float | None = LOADING_SECONDS) -> None:
        """Lets the server unload a model: no request gets in any more, and this returns when those inside are answered.

        Args:
            name: of the model.
            version: of the model, or a label; None unloads all.
            timeout: seconds to wait; None waits for ever.
        """
        request = model_service_pb2.UnloadModelRequest(model=name, version=version)
        self._unary(self._models.UnloadModel, request, timeout)

    def _many(
        self, images: Iterable[AnyInput], request_plan: RequestPlan, concurrency: int, on_error: str
    ) -> Generator[Result | CamserveError]:
        life = self._life.child()
        pending: collections.deque[Future[Result | CamserveError]] = collections.deque()

        def answer(image: AnyInput) -> Result | CamserveError:
            try:
                return self._explain(prepare(image), request_plan, life)
            except CamserveError as error:
                if on_error == "raise":
                    raise
                return error

        with ThreadPoolExecutor(concurrency, thread_name_prefix="camserve-client") as pool:
            try:
                for image in images:
                    pending.append(pool.submit(answer, image))
                    if len(pending) >= 2 * concurrency:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
                life.end()

    def _explain(self, source: PreparedInput, request_plan: RequestPlan, life: Lifetime) -> Result:
        return collect(self._events(source, request_plan, life), source)

    def _events(self, source: PreparedInput, request_plan: RequestPlan, life: Lifetime) -> Generator[Event]:
        started = time.monotonic()
        for attempt in itertools.count(1):
            elapsed = time.monotonic() - started
            has_answered = False
            start = functools.partial(
                self._explanations.Explain,
                request_plan.request(source, elapsed),
                timeout=_left(request_plan.timeout_seconds, elapsed),
                metadata=self._credentials.metadata(),
            )
            with life.calling(start) as call:
                try:
                    for response in call:
                        has_answered = True
                        event = event_from_proto(response, source)
                        if event is not None:
                            yield event
                except grpc.RpcError as error:
                    failure = life.failure(error)
                else:
                    return
            if has_answered:
                raise failure
            self._pause(failure, attempt, _left(request_plan.limit_seconds, time.monotonic() - started), life)

    def _unary(self, rpc: Callable[..., Any], request: Any, limit: float | None) -> Any:
        started = time.monotonic()
        for attempt in itertools.count(1):
            left = _left(limit, time.monotonic() - started)
            call = functools.partial(rpc, request, timeout=left, metadata=self._credentials.metadata())
            try:
                return self._life.begin(call)
            except grpc.RpcError as error:
                failure = self._life.failure(error)
            self._pause(failure, attempt, _left(limit, time.monotonic() - started), self._life)
        raise AssertionError("count() never ends")

    def _pause(self, failure: CamserveError, attempt: int, remaining: float | None, life: Lifetime) -> None:
        """Waits before a retry, or raises the failure when there should be none."""
        wait = self._policy.wait_seconds(
            failure,
            attempt=attempt,
            remaining_seconds=remaining,
            chance=random.random(),  # noqa: S311  # Jitter, no secret.
        )
        if wait is None:
            raise failure
        if life.wait(wait):
            raise errors.closed() from failure


def _left(limit: float | None, elapsed: float) -> float | None:
    """Returns the seconds left of a limit, None when there is none."""
    return None if limit is None else max(limit - elapsed, 0.0)

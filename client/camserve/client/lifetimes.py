"""Who may still make calls: one `Lifetime` for a client, one below it for each `explain_many`.

`sync_client.py` makes its calls and waits for its retries through one, so that `end()` cancels the calls under way and wakes the
waits, and whoever left early leaves nothing running.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import grpc

from camserve.client import errors

_Started = TypeVar("_Started")


class ResponseStream(Protocol):
    """A call under way whose responses arrive one by one, as grpc's stubs return it."""

    def __iter__(self) -> Iterator[Any]: ...

    def cancel(self) -> object:
        """Ends the call; does nothing when it is over."""


class Lifetime:
    """Calls and waits that end together."""

    def __init__(self, forget: Callable[[Lifetime], None] | None = None) -> None:
        self._forget_here = forget
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._calls: set[ResponseStream] = set()
        self._children: set[Lifetime] = set()

    def child(self) -> Lifetime:
        """Returns a lifetime that ends with this one, or before it."""
        child = Lifetime(self._forget)
        with self._lock:
            self._children.add(child)
        if self._ended.is_set():
            child.end()
        return child

    def end(self) -> None:
        """Cancels the calls under way, wakes the waits, refuses further ones. May be called twice, from any thread."""
        self._ended.set()
        with self._lock:
            calls, children = list(self._calls), list(self._children)
        for call in calls:
            call.cancel()
        for child in children:
            child.end()
        if self._forget_here is not None:
            self._forget_here(self)

    def wait(self, seconds: float) -> bool:
        """Waits; returns at once, and True, when this ends."""
        return self._ended.wait(seconds)

    def begin(self, start: Callable[[], _Started]) -> _Started:
        """Starts a call; raises Cancelled when this has ended."""
        if self._ended.is_set():
            raise errors.closed()
        try:
            return start()
        except ValueError:
            # grpc's answer when the channel was closed in another thread just now.
            if self._ended.is_set():
                raise errors.closed() from None
            raise

    @contextlib.contextmanager
    def calling(self, start: Callable[[], ResponseStream]) -> Iterator[ResponseStream]:
        """Starts a call, and cancels it on leaving the block unless it is finished."""
        call = self.begin(start)
        with self._lock:
            self._calls.add(call)
        try:
            if self._ended.is_set():  # Ended after `begin` looked and before `end` could see the call.
                call.cancel()
            yield call
        finally:
            with self._lock:
                self._calls.discard(call)
            call.cancel()

    def failure(self, error: grpc.RpcError) -> errors.CamserveError:
        """Returns what a failed call means: the server's error, or that this has ended."""
        if self._ended.is_set() and error.code() is grpc.StatusCode.CANCELLED:
            return errors.closed()
        return errors.from_rpc_error(error)

    def _forget(self, child: Lifetime) -> None:
        with self._lock:
            self._children.discard(child)

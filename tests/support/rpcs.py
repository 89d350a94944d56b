"""Every rpc that a server answers, read off what is registered with gRPC, whoever registers it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from grpc.aio._server import Server


@contextlib.contextmanager
def registered_rpcs() -> Iterator[set[str]]:
    """Collects the full names of what servers that start inside `with` answer; registering goes on as ever."""
    found: set[str] = set()
    add = Server.add_generic_rpc_handlers

    def collect(server: Server, handlers: object) -> None:
        handlers = tuple(handlers)  # type: ignore[call-overload]  # any iterable
        for handler in handlers:
            found.update(handler._method_handlers)
        add(server, handlers)

    with mock.patch.object(Server, "add_generic_rpc_handlers", collect):
        yield found

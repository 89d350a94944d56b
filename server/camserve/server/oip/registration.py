"""Gives the protocol's calls to a gRPC server, and its descriptors to reflection. The only file of this room that knows gRPC."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pool

from camserve.server.oip.messages import POOL, SERVICE, message_class
from camserve.server.oip.servicer import InferenceServicer
from camserve.server.oip.unbuilt import UNBUILT, refusal

__all__ = ["BothPools", "add_to"]


def add_to(server: Any, servicer: InferenceServicer) -> None:
    """Registers every call of the service with a grpc.aio server."""
    handlers = {}
    for method in POOL.FindServiceByName(SERVICE).methods:
        is_stream = method.client_streaming and method.server_streaming
        handle = grpc.stream_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
        read = message_class(method.input_type).FromString
        answer = refusal(method.name) if method.name in UNBUILT else getattr(servicer, method.name)
        handlers[method.name] = handle(answer, read, _written)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _written(message: Any) -> Any:
    return message.SerializeToString()


class BothPools:
    """Finds descriptors for reflection: this protocol's in its own pool, all others in protobuf's default one.

    In this order, since a foreign copy of the protocol may be in the default pool.
    """

    def __init__(self) -> None:
        self._pools: tuple[Any, ...] = (POOL, descriptor_pool.Default())

    def FindFileByName(self, name: str) -> Any:  # noqa: N802 - protobuf's name
        """The file of that name.

        Raises:
            KeyError: neither has one.
        """
        return self._found("FindFileByName", name)

    def FindFileContainingSymbol(self, name: str) -> Any:  # noqa: N802 - protobuf's name
        """The file with that symbol.

        Raises:
            KeyError: neither has it.
        """
        return self._found("FindFileContainingSymbol", name)

    def FindMessageTypeByName(self, name: str) -> Any:  # noqa: N802 - protobuf's name
        """The message of that name.

        Raises:
            KeyError: neither has one.
        """
        return self._found("FindMessageTypeByName", name)

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:  # noqa: N802 - protobuf's name
        """An extension of a message.

        Raises:
            KeyError: it has none of that number.
        """
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:  # noqa: N802 - protobuf's name
        """Every extension of a message."""
        return message.file.pool.FindAllExtensions(message)

    def _found(self, how: str, name: str) -> Any:
        for pool in self._pools:
            try:
                return getattr(pool, how)(name)
            except KeyError:
                continue
        raise KeyError(name)

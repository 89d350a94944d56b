"""Opens the gRPC port, with or without TLS. Called by `app.py`; a new certificate is taken at the next handshake."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import grpc

from camserve.server.callers.reloaded import Reloaded

if TYPE_CHECKING:
    from camserve.server.callers.tls_files import TlsFiles

__all__ = ["open_port"]


def open_port(server: Any, listen: str, tls: Reloaded[TlsFiles] | None) -> int:
    """Binds a grpc.aio server to an address.

    Connections that are open go on with the certificate they began with.

    Returns:
        The port.

    Raises:
        OSError: it cannot be bound; the text says why.
    """
    try:
        return _bound(server, listen, tls)
    except RuntimeError as error:
        raise OSError(f"listen {listen}: {_why_not(listen)}") from error


def _bound(server: Any, listen: str, tls: Reloaded[TlsFiles] | None) -> int:
    if tls is None:
        return int(server.add_insecure_port(listen))
    credentials = grpc.dynamic_ssl_server_credentials(
        _configuration(tls.value), _Fetch(tls), require_client_authentication=tls.value.client_ca is not None
    )
    return int(server.add_secure_port(listen, credentials))


def _why_not(listen: str) -> str:
    """What the system says of an address that gRPC could not bind; gRPC's own text is about its debugging."""
    if listen.startswith("unix:"):
        return "no socket can be made there; look at the folder and its rights, and whether the path is too long"
    host, _, port = listen.rpartition(":")
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
                tried.listen()
    except OSError as error:
        return error.strerror or str(error)
    return "it could not be bound"


class _Fetch:
    """Asked by gRPC before each handshake, one at a time: for a certificate, or None where the last one still counts."""

    def __init__(self, tls: Reloaded[TlsFiles]) -> None:
        self._tls = tls
        self._given = tls.value

    def __call__(self) -> Any:
        value = self._tls.value
        if value is self._given:
            return None
        self._given = value
        # gRPC keeps what it is given, so that each answer is an object of its own.
        return _configuration(value)


def _configuration(files: TlsFiles) -> Any:
    return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.client_ca)

"""Opens the gRPC port, with or without TLS. Called by `app.py`; a new certificate is taken at the next handshake."""

from __future__ import annotations

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
        RuntimeError: it cannot be bound.
    """
    if tls is None:
        return int(server.add_insecure_port(listen))
    credentials = grpc.dynamic_ssl_server_credentials(
        _configuration(tls.value), _Fetch(tls), require_client_authentication=tls.value.client_ca is not None
    )
    return int(server.add_secure_port(listen, credentials))


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

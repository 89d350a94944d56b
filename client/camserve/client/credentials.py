"""Who a client says it is, and whom it trusts: a key or a token, and certificates. Clients make channels and metadata of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc

__all__ = ["ANONYMOUS", "Credentials"]

_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a client shows to a server, and what it wants to be shown.

    Attributes:
        api_key: of `camserve keys add`.
        token: a JWT, or a function that gives one, asked before each call: for tokens that are renewed.
        tls: TLS with the system's authorities; implied by the others below.
        ca: PEM file of the authorities to trust in their place.
        certificate: PEM file to show to the server, for mutual TLS.
        key: PEM file of its private key.
        server_name: the name to expect on the server's certificate; None means that of the target.
    """

    api_key: str | None = dataclasses.field(default=None, repr=False)
    token: str | Callable[[], str] | None = dataclasses.field(default=None, repr=False)
    tls: bool = False
    ca: _Path | None = None
    certificate: _Path | None = None
    key: _Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and self.token is not None:
            raise ValueError("a call carries one credential: give api_key or token")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key come together: give both or neither")
        if self.api_key is not None:
            _check(self.api_key, "api_key")
        if isinstance(self.token, str):
            _check(self.token, "token")

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or not (self.ca is None and self.certificate is None and self.server_name is None)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries; asks for a token if it is renewed."""
        if self.api_key is not None:
            return (("x-api-key", self.api_key),)
        if self.token is None:
            return ()
        token = self.token if isinstance(self.token, str) else self.token()
        _check(token, "token")
        return (("authorization", f"Bearer {token}"),)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Reads the files; raises OSError when one cannot be read, and ValueError when it is another kind of file."""
        return grpc.ssl_channel_credentials(
            _read(self.ca, "ca", "CERTIFICATE"),
            _read(self.key, "key", "PRIVATE KEY"),
            _read(self.certificate, "certificate", "CERTIFICATE"),
        )


ANONYMOUS: Final = Credentials()


def _check(secret: str, name: str) -> None:
    """A line feed at the end of a file is common, and what gRPC says of it shows the whole text."""
    if not secret or not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise ValueError(
            f"{name} is empty, or has spaces, line ends or letters beyond ASCII in it; it is sent as it stands"
        )


def _read(path: _Path | None, name: str, kind: str) -> bytes | None:
    """A file of another kind is refused here: gRPC would take it, and fail to connect at each call."""
    if path is None:
        return None
    content = Path(path).read_bytes()
    if f"{kind}-----".encode() not in content:
        raise ValueError(f"{name}: {path} holds no PEM {kind.lower()}")
    return content

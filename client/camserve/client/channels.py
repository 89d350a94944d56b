"""How the clients reach a server: channel options and TLS, the same for sync and async."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Final

import grpc

_LARGEST_MESSAGE_BYTES: Final = 64 * 1024 * 1024

OPTIONS: Final = (
    # gRPC's 4 MiB is less than one photograph.
    ("grpc.max_send_message_length", _LARGEST_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _LARGEST_MESSAGE_BYTES),
    # Notices a vanished peer during a long call. Servers refuse clients that ping much more often.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # We retry ourselves, and say so; a second retrier below would multiply the attempts.
    ("grpc.enable_retries", 0),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Which certificates to trust and to show.

    Attributes:
        root_certificates: PEM file of the authorities to trust; None means the system's.
        client_certificate: PEM file to show to the server, for mutual TLS.
        client_key: PEM file of its private key.
        server_name: the name to expect on the server's certificate; None means that of the target.
    """

    root_certificates: str | os.PathLike[str] | None = None
    client_certificate: str | os.PathLike[str] | None = None
    client_key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("client_certificate and client_key come together: give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files; raises OSError when one cannot be read."""
        return grpc.ssl_channel_credentials(
            _read(self.root_certificates), _read(self.client_key), _read(self.client_certificate)
        )


def tls_of(tls: bool | Tls) -> Tls | None:  # noqa: FBT001  # True is the natural way to say "with TLS".
    """Returns what a client's `tls` argument means: None for plain text."""
    if isinstance(tls, Tls):
        return tls
    return Tls() if tls else None


def options_of(tls: Tls | None) -> list[tuple[str, str | int]]:
    """Returns the options of a channel."""
    options: list[tuple[str, str | int]] = list(OPTIONS)
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()

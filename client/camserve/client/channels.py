"""How the clients reach a server: channel options, the same for sync and async."""

from __future__ import annotations

from typing import Final

from camserve.client.credentials import Credentials

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


def options_of(credentials: Credentials) -> list[tuple[str, str | int]]:
    """Returns the options of a channel."""
    options: list[tuple[str, str | int]] = list(OPTIONS)
    if credentials.server_name is not None:
        options.append(("grpc.ssl_target_name_override", credentials.server_name))
    return options

"""What one connection may take, as gRPC's options: its messages, headers, streams and pings, its age, and how many there are.

`app.py` gives them to the server. Each was seen to act on a real `grpc.aio` server (tests/e2e/test_connection_limits.py): gRPC
takes any name for an option, and says nothing to those that it does not know.
"""

from __future__ import annotations

import resource

from camserve.server.settings import Settings

__all__ = ["connection_options", "most_connections"]

# Enough for a tensor of 3 x 224 x 224 in float32, and for most pictures, to arrive while their call begins: what is larger waits
# for one more turn of the network. Small enough that many calls whose messages nobody reads yet do not fill the memory.
_LOOKAHEAD_BYTES = 640 << 10
# What gRPC means by for ever.
_NEVER_MS = (1 << 31) - 1


def most_connections(wanted: int, open_files: int) -> int:
    """How many connections are taken at once: what is wanted, but no more than half of the files that the process may open.

    The rest is for models, pages and logs: a server that cannot open a file any more cannot take connections either.
    """
    return max(1, min(wanted, open_files // 2))


def connection_options(settings: Settings) -> list[tuple[str, int]]:
    """The options of a gRPC server with these settings."""
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        ("grpc.so_reuseport", 0),
        # What gRPC takes of a message before anybody asks for it, whatever it thinks that the network could carry.
        ("grpc.http2.lookahead_bytes", _LOOKAHEAD_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        # Between a soft and a hard limit gRPC would refuse some and let others pass, by chance.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        # Counts streams that were reset and are not yet forgotten as well: else who opens and resets them as fast as it can
        # fills the queue that all connections share, and gRPC cancels other callers' requests.
        ("grpc.max_concurrent_streams", settings.max_connection_streams),
        ("grpc.max_allowed_incoming_connections", most_connections(settings.max_connections, open_files)),
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.handshake_seconds)),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.idle_connection_seconds) or _NEVER_MS),
        ("grpc.max_connection_age_ms", _milliseconds(settings.connection_age_seconds) or _NEVER_MS),
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.connection_age_grace_seconds)),
        # A peer that vanished without a word is found out, also one that asks for nothing at the moment.
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        # The time for the answer to any ping, a keepalive's too; a minute by itself, whatever the line above says.
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        # The name is gRPC's; in its documentation it has one more word, and does nothing.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_seconds)),
    ]


def _milliseconds(seconds: float) -> int:
    return min(round(seconds * 1000), _NEVER_MS)

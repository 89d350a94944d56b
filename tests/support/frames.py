"""A client that speaks HTTP/2 a frame at a time, and so may say what no library would: half a request, or a thousand pings.

It answers what a server must be answered, settings and pings, unless told not to, and reads only when it is asked to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

__all__ = [
    "EXPLAIN",
    "PREFACE",
    "Frame",
    "Kind",
    "RawConnection",
    "frame",
    "headers",
    "message_head",
    "send_as_allowed",
]

EXPLAIN = "/camserve.v1.ExplanationService/Explain"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_ACK = 1
_END_STREAM = 1
_END_HEADERS = 4


class Kind(enum.IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One that arrived.

    Attributes:
        kind: its type, as a number, since there are others than we know.
        flags: of its type.
        stream: it belongs to; 0 for the connection.
        payload: its bytes.
    """

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def error(self) -> int:
        """The error code of a RST_STREAM or a GOAWAY."""
        place = 4 if self.kind == Kind.GOAWAY else 0
        return int.from_bytes(self.payload[place : place + 4], "big")


def frame(kind: Kind, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame as it is sent."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(path: str, extra: dict[bytes, bytes] | None = None) -> bytes:
    """The header block of a gRPC call, every entry as a literal."""
    entries = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path.encode(),
        b":authority": b"test",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        **(extra or {}),
    }
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in entries.items())


def message_head(size: int) -> bytes:
    """What goes before a gRPC message of so many bytes."""
    return b"\x00" + size.to_bytes(4, "big")


class RawConnection:
    """A connection to a server; closed with its `with` block.

    Args:
        target: host and port.
        greets: whether it says that it speaks HTTP/2.
        answers: whether it answers the server's settings and pings.
    """

    def __init__(self, target: str, *, greets: bool = True, answers: bool = True) -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=60)
        self._answers = answers and greets
        self._received = b""
        if greets:
            self.send(PREFACE + frame(Kind.SETTINGS, 0, 0))

    def __enter__(self) -> Self:
        """Is open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Closes it without a word."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Sends bytes as they are.

        Raises:
            OSError: the server has closed the connection.
        """
        self._socket.sendall(data)

    def call(self, path: str, stream: int, extra: dict[bytes, bytes] | None = None) -> None:
        """Begins a call: its headers, no message."""
        self.send(frame(Kind.HEADERS, _END_HEADERS, stream, headers(path, extra)))

    def data(self, stream: int, payload: bytes, *, ends: bool = False) -> None:
        """Sends a piece of a message."""
        self.send(frame(Kind.DATA, _END_STREAM if ends else 0, stream, payload))

    def ping(self) -> None:
        """Asks the server whether it is there."""
        self.send(frame(Kind.PING, 0, 0, bytes(8)))

    def frames(self, seconds: float) -> Iterator[Frame]:
        """What arrives until the server closes the connection, or for so long."""
        until = time.monotonic() + seconds
        while True:
            while (found := self._next()) is not None:
                yield found
            left = until - time.monotonic()
            if left <= 0:
                return
            self._socket.settimeout(left)
            try:
                received = self._socket.recv(1 << 16)
            except TimeoutError:
                return
            except ConnectionError:
                received = b""
            if not received:
                self._answers = False
                return
            self._received += received

    def first(self, kind: Kind, seconds: float = 60) -> Frame | None:
        """The next frame of a type; None if the connection was closed, or so long nothing of the kind came."""
        for found in self.frames(seconds):
            if found.kind == kind and not (kind in (Kind.PING, Kind.SETTINGS) and not found.flags & _ACK):
                return found
        return None

    def is_closed_within(self, seconds: float) -> bool:
        """Whether the server closes the connection; reads what comes before."""
        until = time.monotonic() + seconds
        for _ in self.frames(seconds):
            pass
        return time.monotonic() < until

    def _next(self) -> Frame | None:
        length = int.from_bytes(self._received[:3], "big")
        if len(self._received) < 9 + length:
            return None
        found = Frame(
            kind=self._received[3],
            flags=self._received[4],
            stream=int.from_bytes(self._received[5:9], "big"),
            payload=self._received[9 : 9 + length],
        )
        self._received = self._received[9 + length :]
        if self._answers and found.kind in (Kind.SETTINGS, Kind.PING) and not found.flags & _ACK:
            # The server may have closed it behind what we are just reading.
            with contextlib.suppress(OSError):
                self.send(frame(Kind(found.kind), _ACK, 0, found.payload if found.kind == Kind.PING else b""))
        return found


def _text(value: bytes) -> bytes:
    """As HPACK writes a string without compressing it."""
    length, first = len(value), 127
    if length < first:
        return bytes([length]) + value
    coded, length = bytearray([first]), length - first
    while length >= 128:
        coded.append(length % 128 + 128)
        length //= 128
    return bytes([*coded, length]) + value


def send_as_allowed(connection: RawConnection, messages: dict[int, bytes], seconds: float) -> tuple[int, set[int]]:
    """Sends pieces of messages on their streams, as far as the server's flow control lets them through.

    Args:
        connection: whose settings have not been read yet.
        messages: by stream that has begun.
        seconds: after which it is given up.

    Returns:
        Bytes sent, and the streams that the server has ended.
    """
    left, sent, over = dict(messages), 0, set[int]()
    windows, of_all, initial = dict.fromkeys(messages, 65535), 65535, 65535
    for found in connection.frames(seconds):
        number = int.from_bytes(found.payload[:4], "big")
        if found.kind == Kind.WINDOW_UPDATE and not found.stream:
            of_all += number
        elif found.kind == Kind.WINDOW_UPDATE:
            windows[found.stream] += number
        elif found.kind == Kind.RST_STREAM or (found.kind == Kind.HEADERS and found.flags & _END_STREAM):
            over.add(found.stream)
        elif found.kind == Kind.SETTINGS and not found.flags & _ACK:
            for place in range(0, len(found.payload), 6):
                if found.payload[place : place + 2] == b"\x00\x04":
                    told = int.from_bytes(found.payload[place + 2 : place + 6], "big")
                    windows = {stream: window + told - initial for stream, window in windows.items()}
                    initial = told
        for stream in left.keys() - over:
            while (room := min(1 << 14, of_all, windows[stream], len(left[stream]))) > 0:
                connection.data(stream, left[stream][:room])
                left[stream] = left[stream][room:]
                of_all, windows[stream], sent = of_all - room, windows[stream] - room, sent + room
    return sent, over

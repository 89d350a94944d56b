"""A way to a server on which everything can be lost: a TCP proxy that stops forwarding, and closes nothing.

To both sides it looks like a cable that was pulled: their kernels still hold the connection, and nobody answers.
"""

from __future__ import annotations

import selectors
import socket
import threading
from types import TracebackType
from typing import Self

__all__ = ["VanishingProxy"]


class VanishingProxy:
    """Forwards until told to stop, on a thread of its own; for the length of a `with` block.

    Args:
        target: host and port of the server.
        source: the address that the server sees.

    Attributes:
        target: where to connect instead.
    """

    def __init__(self, target: str, source: str = "127.0.0.1") -> None:
        host, _, port = target.rpartition(":")
        self._server = (host, int(port))
        self._source = (source, 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._wake, self._woken = socket.socketpair()
        self._is_forwarding = True
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._forward, name="proxy")

    def __enter__(self) -> Self:
        """Begins to forward."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes what is left."""
        self.vanish()
        for one in (*self._sockets, self._listener, self._wake, self._woken):
            one.close()

    def vanish(self) -> None:
        """Forwards nothing any more, in neither direction; every connection stays open."""
        if self._is_forwarding:
            self._is_forwarding = False
            self._wake.send(b"x")
            self._thread.join()

    def _forward(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while self._is_forwarding:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        client, _ = self._listener.accept()
                        server = socket.create_connection(self._server, source_address=self._source)
                        self._sockets += [client, server]
                        selector.register(client, selectors.EVENT_READ, server)
                        selector.register(server, selectors.EVENT_READ, client)
                    elif isinstance(key.data, socket.socket) and isinstance(key.fileobj, socket.socket):
                        received = key.fileobj.recv(1 << 16)
                        if received:
                            key.data.sendall(received)
                        else:
                            selector.unregister(key.fileobj)

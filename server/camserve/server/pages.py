"""What is read over HTTP: `/livez` and `/readyz` for probes, `/metrics` for Prometheus.

On threads of its own, so that nobody waits for the event loop or can be kept waiting by it. `app.py` opens it.
"""

from __future__ import annotations

import contextlib
import io
import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

__all__ = ["Pages"]

_log = structlog.get_logger("camserve.pages")

_App: TypeAlias = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

_MOST_CONNECTIONS = 16
# A scrape takes milliseconds. Who has not sent or read for this long is let go; who stands in the way of others, sooner.
_IDLE_SECONDS = 5.0
_PATIENCE_SECONDS = 1.0
# How soon `close` is noticed.
_POLL_SECONDS = 0.1


class Pages:
    """Serves until closed.

    Args:
        address: host:port; port 0 takes a free one.
        registry: of the metrics.
        liveness: why the process should be ended, or "" while all is well; asked on another thread.
        readiness: why no requests should be sent, or ""; likewise.

    Attributes:
        port: that is listened on.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(
        self, address: str, registry: CollectorRegistry, *, liveness: Callable[[], str], readiness: Callable[[], str]
    ) -> None:
        host, _, port = address.rpartition(":")
        probes = {"/livez": liveness, "/readyz": readiness}
        try:
            self._server = _Server(host.strip("[]"), int(port), _app(make_wsgi_app(registry), probes))
        except OSError as error:
            raise OSError(f"metrics_listen {address}: {error.strerror}") from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="camserve-pages", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _app(metrics: _App, probes: Mapping[str, Callable[[], str]]) -> _App:
    """The pages by path."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def text(status: str, line: str, *headers: tuple[str, str]) -> Iterable[bytes]:
            start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
            return [f"{line}\n".encode()]

        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        if path not in probes:
            return text("404 Not Found", f"nothing is here; there are {', '.join(probes)} and /metrics")
        if environ["REQUEST_METHOD"] not in {"GET", "HEAD"}:
            return text("405 Method Not Allowed", "use GET or HEAD", ("Allow", "GET, HEAD"))
        reason = probes[path]()
        return text("503 Service Unavailable", reason) if reason else text("200 OK", "ok")

    return app


class _Handler(WSGIRequestHandler):
    """One request of one connection."""

    timeout = _IDLE_SECONDS

    def get_stderr(self) -> TextIO:
        """Where the library writes the traceback of a page that failed."""
        return _Complaint()

    def log_message(self, *_arguments: object) -> None:
        """Probes ask every few seconds; they would bury everything else."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each connection, up to a bound; when all are taken, connections that have been open for long are cut."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, app: _App) -> None:
        (self.address_family, _, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self._places = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._lock = threading.Lock()
        self._opened_at: dict[socket.socket, float] = {}
        super().__init__((str(address[0]), port), _Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        """Binds; unlike the library's, it asks no name server who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Finds a place for a new connection, if need be at the cost of others.

        Raises:
            TimeoutError: not even that gave one; the connection is closed.
        """
        if not self._places.acquire(blocking=False):
            self._cut_slow()
            if not self._places.acquire(timeout=_PATIENCE_SECONDS):
                self._cut_slow()
                if not self._places.acquire(timeout=_IDLE_SECONDS):
                    raise TimeoutError
        with self._lock:
            self._opened_at[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection and gives its place, if it had one, to another."""
        with self._lock:
            had_place = self._opened_at.pop(request, None) is not None
        super().shutdown_request(request)
        if had_place:
            self._places.release()

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        """A peer that went away is no event."""

    def _cut_slow(self) -> None:
        """Their threads, which wait for the peer, then fail at once and give the places back."""
        before = time.monotonic() - _PATIENCE_SECONDS
        with self._lock:
            slow = [request for request, opened_at in self._opened_at.items() if opened_at <= before]
            for request in slow:
                self._opened_at[request] = math.inf
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)


class _Complaint(io.StringIO):
    """One traceback, logged as one line when it is complete."""

    def flush(self) -> None:
        """The library does so behind what it wrote."""
        _log.warning("page failed", exception=self.getvalue())

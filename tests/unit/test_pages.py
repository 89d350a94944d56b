"""The HTTP pages over real sockets: what probes read, and that nobody shuts them out."""

from __future__ import annotations

import concurrent.futures
import http.client
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from camserve.server import pages as pages_module
from camserve.server.pages import Pages


class State:
    """What the pages are asked about; the test changes it."""

    liveness = ""
    readiness = ""


@pytest.fixture
def state() -> State:
    """All is well."""
    return State()


@pytest.fixture
def registry() -> CollectorRegistry:
    """One metric of two megabytes: more than the buffers of a connection hold."""
    registry = CollectorRegistry()
    gauge = Gauge("large", "A page that does not fit into a socket.", ["name"], registry=registry)
    for number in range(2000):
        gauge.labels(f"{number} {'x' * 1000}").set(number)
    return registry


@pytest.fixture
def pages(state, registry) -> Iterator[Pages]:
    """Served on a free port."""
    pages = Pages("127.0.0.1:0", registry, liveness=lambda: state.liveness, readiness=lambda: state.readiness)
    yield pages
    pages.close()


def read(pages: Pages, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and text of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", pages.port, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


@pytest.mark.parametrize(("path", "name"), [("/livez", "liveness"), ("/readyz", "readiness")])
def test_a_probe_is_told_why_not(pages, state, path, name):
    """200 while all is well; 503 with the reason while it is not, and 200 again after."""
    assert (200, "ok\n") == read(pages, path)
    setattr(state, name, "the event loop does not answer")
    assert (503, "the event loop does not answer\n") == read(pages, path)
    setattr(state, name, "")
    assert (200, "ok\n") == read(pages, path)


def test_each_probe_has_its_own_reason(pages, state):
    """A server that loads lives."""
    state.readiness = "loading"

    assert (200, "ok\n") == read(pages, "/livez")
    assert (503, "loading\n") == read(pages, "/readyz")


def test_metrics(pages):
    """The registry's metrics, and only under their own path."""
    status, text = read(pages, "/metrics")

    assert 200 == status
    assert re.search(r'^large\{name="1999 x+"\} 1999\.0$', text, re.MULTILINE)


@pytest.mark.parametrize("path", ["/", "/metrics/", "/livez/x", "/health", "/%00"])
def test_other_paths_are_not_found(pages, path):
    """The text tells which there are."""
    assert (404, "nothing is here; there are /livez, /readyz and /metrics\n") == read(pages, path)


def test_other_methods_are_refused(pages):
    """Probes are read, not written; HEAD reads the status alone."""
    assert 405 == read(pages, "/livez", "POST")[0]
    assert 405 == read(pages, "/metrics", "DELETE")[0]
    assert (200, "") == read(pages, "/readyz", "HEAD")


def test_scrapes_at_once_are_all_answered(pages):
    """More at a time than there are threads: they take turns."""
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: read(pages, "/livez"), range(200)))

    assert [(200, "ok\n")] * 200 == answers


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT", b"GET /metrics HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\xff\x01"])
def test_slow_clients_shut_nobody_out(pages, sent):
    """They say nothing or half a request, or ask and do not read, twice as many as there are threads: a probe is answered."""
    slow = [socket.create_connection(("127.0.0.1", pages.port)) for _ in range(2 * pages_module._MOST_CONNECTIONS)]
    for connection in slow:
        connection.sendall(sent)

    answer = read(pages, "/livez")
    threads = [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]
    for connection in slow:
        connection.close()

    assert (200, "ok\n") == answer
    assert pages_module._MOST_CONNECTIONS >= len(threads)


def test_a_page_that_fails_is_one_line_of_the_log(registry, log_lines):
    """The peer gets a 500; the traceback goes to the log, not bare to standard error."""

    def fail() -> str:
        raise ZeroDivisionError

    failing = Pages("127.0.0.1:0", registry, liveness=fail, readiness=fail)
    status, _ = read(failing, "/livez")
    failing.close()

    assert 500 == status
    assert ["page failed"] == [line["event"] for line in log_lines]
    assert "ZeroDivisionError" in log_lines[0]["exception"]


def test_an_address_in_use_is_named(pages, registry):
    """Whoever starts the server reads which setting it is about."""
    with pytest.raises(OSError, match=rf"metrics_listen 127.0.0.1:{pages.port}: Address already in use"):
        Pages(f"127.0.0.1:{pages.port}", registry, liveness=str, readiness=str)

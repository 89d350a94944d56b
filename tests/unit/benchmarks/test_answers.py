"""Claims about how peers are asked, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest
from benchmarks.peers.answers import NotReady, Refused, http, parse
from benchmarks.peers.load import closed_loop
from benchmarks.peers.processes import free_ports

ANSWER = b'{"classes": [7, 3], "shape": [1, 2]}\n\x00\xff'


async def serve(answer: bytes, seen: list[bytes]) -> asyncio.Server:
    """An HTTP server that always gives this answer and notes what it is sent."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # The caller has left.
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                seen.append(head + await reader.readexactly(length))
                writer.write(answer)
        writer.close()

    return await asyncio.start_server(handle, "127.0.0.1", 0)


def reply(status: int, body: bytes) -> bytes:
    """A whole HTTP reply."""
    return b"HTTP/1.1 %d Words\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def test_answer_is_class_and_map() -> None:
    """A line of JSON and the map's bytes."""
    answer = parse(ANSWER)

    assert 7 == answer.class_index
    np.testing.assert_array_equal([[0, 255]], answer.heatmap)


def test_prediction_only_has_an_empty_map() -> None:
    """No bytes follow the line."""
    assert 0 == parse(b'{"classes": [1], "shape": [0, 0]}\n').heatmap.size


async def test_http_keeps_its_connection() -> None:
    """Two questions one after the other; an upload carries the file in a form."""
    seen: list[bytes] = []
    server = await serve(reply(200, ANSWER), seen)
    port = server.sockets[0].getsockname()[1]

    async with http(port, path="/predict", is_upload=True) as ask:
        assert 7 == (await ask(b"JPEG")).class_index
        assert 7 == (await ask(b"JPEG")).class_index
    server.close()
    await server.wait_closed()

    assert 2 == len(seen)
    assert seen[0].startswith(b"POST /predict HTTP/1.1\r\n")
    assert b"\r\n\r\nJPEG\r\n--" in seen[0]


@pytest.mark.parametrize(("status", "error"), [(404, NotReady), (503, NotReady), (500, Refused)])
async def test_http_errors(status: int, error: type[Exception]) -> None:
    """A server without its route is not ready; one that fails has refused."""
    server = await serve(reply(status, b"why"), [])

    async with http(server.sockets[0].getsockname()[1], path="/", is_upload=False) as ask:
        with pytest.raises(error, match="why"):
            await ask(b"")
    server.close()
    await server.wait_closed()


async def test_no_server_is_not_ready() -> None:
    """Nobody listens yet."""
    async with http(free_ports(1)[0], path="/", is_upload=False) as ask:
        with pytest.raises(NotReady):
            await ask(b"")


async def test_load_keeps_every_caller_busy() -> None:
    """As many questions are under way as there are callers, never more; all images are asked about in turn."""
    under_way, most, asked = 0, 0, []

    async def ask(image: bytes):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        asked.append(image)
        await asyncio.sleep(0)
        under_way -= 1
        return parse(ANSWER)

    finished = await closed_loop(ask, [b"a", b"b", b"c"], concurrency=5, seconds=0.01)

    assert 5 == most
    assert 0 == under_way
    assert len(asked) == len(finished) > 5
    assert [b"a", b"b", b"c", b"a"] == asked[:4]

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from camserve.client import AsyncClient, Cancelled, Client, InvalidRequest, Overloaded, Unavailable, errors
from camserve.client.retries import RetryPolicy
from tests.unit.client.conftest import Peer, abort, prediction, status

FULL = status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", retry_after=0.01)
DRAINING = status("UNAVAILABLE", "DRAINING", "draining")


def _wait(
    error: errors.CamserveError, attempt: int = 1, remaining: float | None = None, chance: float = 0.0
) -> float | None:
    return RetryPolicy(retries=3, first_seconds=0.2, longest_seconds=1.0).wait_seconds(
        error, attempt=attempt, remaining_seconds=remaining, chance=chance
    )


def test_the_wait_doubles_up_to_a_limit_and_is_spread() -> None:
    """Callers refused together do not come back together."""
    policy = RetryPolicy(retries=9, first_seconds=0.2, longest_seconds=1.0)
    error = errors.from_status(DRAINING)

    waits = [policy.wait_seconds(error, attempt=n, remaining_seconds=None, chance=0.0) for n in range(1, 6)]

    assert pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5]) == waits
    assert pytest.approx(0.15) == _wait(error, chance=0.5)


def test_the_servers_own_time_is_honoured() -> None:
    """Never earlier than RetryInfo says."""
    error = errors.from_status(status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", retry_after=2))

    assert pytest.approx(2.0) == _wait(error)
    assert pytest.approx(2.2) == _wait(error, chance=0.5)


def test_there_is_no_retry_past_the_deadline_the_count_or_for_lasting_errors() -> None:
    """Then the caller should hear of the failure now."""
    full = errors.from_status(status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", retry_after=2))

    assert _wait(full, remaining=2.0) is None
    assert _wait(full, attempt=4) is None
    assert _wait(errors.from_status(status("INVALID_ARGUMENT", "FIELD_INVALID", "wrong"))) is None


def test_calls_refused_before_the_first_message_are_tried_again(peer: Peer, client: Client, png: bytes) -> None:
    """Two refusals pass unnoticed."""
    peer.failures.extend([FULL, FULL])

    assert "scratch" == client.explain(png, model="surface").prediction.label
    assert 3 == len(peer.requests)


async def test_the_async_client_tries_again_likewise(peer: Peer, async_client: AsyncClient, png: bytes) -> None:
    """The siblings share the policy."""
    peer.failures.extend([FULL, FULL])

    async with async_client:
        assert "scratch" == (await async_client.explain(png, model="surface")).prediction.label
    assert 3 == len(peer.requests)


async def test_a_call_that_the_server_ends_untaken_is_tried_again(
    peer: Peer, client: Client, async_client: AsyncClient, png: bytes
) -> None:
    """A server that stops ends calls that it has not taken with a bare CANCELLED; a caller who did not cancel finds another."""

    def ends_the_first(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if len(peer.requests) in {1, 3}:
            context.abort(grpc.StatusCode.CANCELLED, "")
        yield from peer.full_answer(request, context)

    peer.answer = ends_the_first

    assert "scratch" == (await asyncio.to_thread(client.explain, png, model="surface")).prediction.label
    async with async_client:
        assert "scratch" == (await async_client.explain(png, model="surface")).prediction.label
    assert 4 == len(peer.requests)


def test_unary_calls_are_tried_again(peer: Peer, client: Client) -> None:
    """Listing models outlives a restart, too."""
    peer.failures.append(FULL)

    assert ["broken", "surface"] == [status.name for status in client.models()]


def test_the_last_refusal_is_raised(peer: Peer, png: bytes) -> None:
    """After `retries` further attempts there is an end."""
    peer.failures.extend([FULL] * 5)

    with Client(peer.target, retries=2) as client, pytest.raises(Overloaded):
        client.explain(png, model="surface")

    assert 3 == len(peer.requests)


def test_lasting_errors_are_raised_at_once(peer: Peer, client: Client) -> None:
    """What is wrong in itself is sent once."""
    with pytest.raises(InvalidRequest, match="IMAGE_UNDECODABLE"):
        client.explain(b"no image", model="surface")

    assert 1 == len(peer.requests)


def test_nothing_is_tried_again_after_the_first_message(peer: Peer, client: Client, png: bytes) -> None:
    """The caller may already have acted on the prediction."""

    def answer(request, context):  # type: ignore[no-untyped-def]
        yield prediction()
        abort(context, DRAINING)

    peer.answer = answer
    with pytest.raises(Unavailable, match="DRAINING"):
        client.explain(png, model="surface")

    assert 1 == len(peer.requests)


def test_a_wait_that_would_outlast_the_timeout_is_not_begun(peer: Peer, client: Client, png: bytes) -> None:
    """The server asks for an hour, the caller has less: the refusal is raised now."""
    peer.failures.append(status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", retry_after=3600))
    started = time.monotonic()

    with pytest.raises(Overloaded):
        client.explain(png, model="surface", timeout=3000)

    assert time.monotonic() - started < 3000


def test_a_retry_is_given_only_what_is_left_of_the_deadline(peer: Peer, client: Client, png: bytes) -> None:
    """The server hears of the caller's deadline, less what earlier attempts took."""
    peer.failures.append(FULL)

    client.explain(png, model="surface", deadline=100.0)

    first, second = (request.deadline.ToMilliseconds() for request in peer.requests)
    assert 0 < second < first <= 100_000


def test_closing_wakes_a_wait(peer: Peer, png: bytes) -> None:
    """A caller in its pause before a retry is let go at once."""
    client = Client(peer.target, timeout=None)
    peer.failures.append(status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", retry_after=3600))
    raised: list[Exception] = []

    def explain() -> None:
        try:
            client.explain(png, model="surface")
        except Cancelled as error:
            raised.append(error)

    caller = threading.Thread(target=explain)
    caller.start()
    client.close()
    caller.join(120)

    assert not caller.is_alive()
    assert ["CLIENT_CLOSED"] == [error.reason for error in raised]  # type: ignore[attr-defined]

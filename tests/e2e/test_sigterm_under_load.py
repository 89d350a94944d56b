"""SIGTERM at random moments of a loaded server's life: whoever was let in is answered, whoever was not is told so.

Each round is a process of its own under closed loop load with several kinds of requests. What callers saw is held against what
the server wrote about every call.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from support.identity import Kind, foreign, is_complete, request, write_repository
from support.load import Served, started

from camserve.client.errors import from_rpc_error
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import explanation_service_pb2_grpc

CALLERS = 16
CHANNELS = 4
LONGEST_LIFE_SECONDS = 1.0
DRAIN_SECONDS = 60.0
STARTED_AHEAD = 2
# Small chunks and passes: at any moment some are decoded, some wait, and some are between two chunks.
SETTINGS = {"slice_seconds": 0.002, "max_batch_rows": 4, "torch_threads": 1, "drain_seconds": DRAIN_SECONDS}


@dataclasses.dataclass(slots=True, kw_only=True)
class Round:
    """What one server and its callers did.

    Attributes:
        answered: requests answered whole and right.
        refused: those told that the server is draining.
        unreached: those that met no server any more.
        faults: what should not have been, in words.
        open: requests in flight.
        inside: requests in flight when the signal was sent.
        end_seconds: from the signal to the end of the process.
    """

    answered: set[str] = dataclasses.field(default_factory=set)
    refused: set[str] = dataclasses.field(default_factory=set)
    unreached: set[str] = dataclasses.field(default_factory=set)
    faults: list[str] = dataclasses.field(default_factory=list)
    open: int = 0
    inside: int = 0
    end_seconds: float = 0.0


async def ask_until_told_off(
    stub: explanation_service_pb2_grpc.ExplanationServiceStub,
    numbers: Iterator[int],
    chance: random.Random,
    seen: Round,
    has_begun: asyncio.Event,
) -> None:
    """One caller: asks again as soon as it is answered, until it is refused or meets nobody."""
    for number in numbers:
        kind = chance.choices(list(Kind), weights=(6, 2, 2))[0]
        messages: list[service_pb2.ExplainResponse] = []
        seen.open += 1
        try:
            async for message in stub.Explain(request(number, kind, "scripted"), timeout=60):
                messages.append(message)
                has_begun.set()
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error)
            if messages or failure.code != "UNAVAILABLE":
                seen.faults.append(f"request {number}: {failure.code} {failure} after {len(messages)} messages")
            elif failure.reason == "DRAINING":
                seen.refused.add(str(number))
            else:
                seen.unreached.add(str(number))
            return
        finally:
            seen.open -= 1
        seen.faults += foreign(number, kind, messages)
        if is_complete(messages):
            seen.answered.add(str(number))
        else:
            seen.faults.append(f"request {number}: {len(messages)} messages and OK")


async def live_and_end(served: Served, chance: random.Random) -> Round:
    """Loads a server, sends it SIGTERM at a random moment, and waits until every caller has been told off."""
    seen, has_begun = Round(), asyncio.Event()
    numbers = iter(range(1_000_000))
    async with contextlib.AsyncExitStack() as channels:
        # Without a second try: what a caller sees is what happened. Each channel with a connection of its own.
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        stubs = [
            explanation_service_pb2_grpc.ExplanationServiceStub(
                await channels.enter_async_context(grpc.aio.insecure_channel(served.process.target, options))
            )
            for _ in range(CHANNELS)
        ]
        async with asyncio.TaskGroup() as group:
            for place in range(CALLERS):
                group.create_task(ask_until_told_off(stubs[place % CHANNELS], numbers, chance, seen, has_begun))
            await has_begun.wait()
            # The moment is what is drawn: there is nothing to wait for.
            await asyncio.sleep(chance.uniform(0, LONGEST_LIFE_SECONDS))
            seen.inside, since = seen.open, time.monotonic()
            served.process.ask_to_end()
    status = await asyncio.to_thread(served.process.ended)
    seen.end_seconds = time.monotonic() - since
    if status != 0:
        seen.faults.append(f"exit status {status}")
    return seen


def compare(served: Served, seen: Round) -> list[str]:
    """What callers saw against what the server wrote: nobody who was let in may be missing on the other side."""
    codes = {str(call.get("request_id")): (call["code"], call.get("reason", "")) for call in served.calls()}
    told = []
    if odd := {
        request_id: code for request_id, code in codes.items() if code not in {("OK", ""), ("UNAVAILABLE", "DRAINING")}
    }:
        told.append(f"the server ended calls otherwise: {odd}")
    let_in = {request_id for request_id, (code, _) in codes.items() if code == "OK"}
    if let_in != seen.answered:
        told.append(
            f"let in and not answered: {sorted(let_in - seen.answered)}; "
            f"answered and not on record: {sorted(seen.answered - let_in)}"
        )
    return told


def storm(folder: Path, rounds: int) -> list[Round]:
    """So many rounds, with servers started ahead of them."""
    repository = write_repository(folder / "models", ["scripted"])

    def start(place: int) -> Served:
        flags = ["--models", str(repository), "--listen", "127.0.0.1:0"]
        return started(flags, folder / f"log{place}", **SETTINGS)

    seen = []
    with concurrent.futures.ThreadPoolExecutor(STARTED_AHEAD) as starting:
        ahead: collections.deque[concurrent.futures.Future[Served]] = collections.deque()
        to_come = iter(range(rounds))
        try:
            for place in range(rounds):
                ahead.extend(
                    starting.submit(start, later) for later in itertools.islice(to_come, STARTED_AHEAD + 1 - len(ahead))
                )
                served = ahead.popleft().result()
                children = psutil.Process(served.pid).children(recursive=True)
                found = asyncio.run(live_and_end(served, random.Random(place)))  # noqa: S311 - no secret
                found.faults += compare(served, found)
                found.faults += [f"{child} outlived the server" for child in children if child.is_running()]
                found.faults = [f"round {place}: {fault}" for fault in found.faults]
                seen.append(found)
        finally:
            for future in ahead:
                future.result().close()
    return seen


def assert_nobody_was_lost(rounds: list[Round]) -> None:
    """Every round ended well, and the signals struck requests in flight."""
    assert [] == [fault for seen in rounds for fault in seen.faults]
    assert all(seen.answered for seen in rounds)
    assert sum(seen.inside for seen in rounds) > 0
    assert max(seen.end_seconds for seen in rounds) < DRAIN_SECONDS


def test_sigterm_twice(tmp_path):
    """Two servers end under load: nobody who was let in is lost, the processes end with 0."""
    assert_nobody_was_lost(storm(tmp_path, 2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sigterm_a_hundred_times(tmp_path):
    """A hundred servers end at a hundred moments."""
    rounds = storm(tmp_path, 100)

    ends = sorted(seen.end_seconds for seen in rounds)
    print(  # noqa: T201 - told in docs
        f"\n{len(rounds)} rounds: {sum(len(seen.answered) for seen in rounds)} answered, "
        f"{sum(seen.inside for seen in rounds)} of them in flight at the signal, "
        f"{sum(len(seen.refused) for seen in rounds)} refused, {sum(len(seen.unreached) for seen in rounds)} met nobody; "
        f"ended after {ends[len(ends) // 2]:.2f} s, at most {ends[-1]:.2f} s"
    )
    assert_nobody_was_lost(rounds)

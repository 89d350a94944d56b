"""Thousands of streams over one server, half of which are cancelled at a random stage, and what became of each.

Every caller reads as it goes and checks that what came is its own (`support.identity`); nobody waits longer than a hang would
take to be called one. The same streams can be sent to the bare control, whose answers belong to nobody and are not checked.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import enum
import random
from collections.abc import Iterator, Sequence

import grpc
from support.identity import MODELS, Kind, foreign, is_complete, request

from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import explanation_service_pb2_grpc

__all__ = ["Leaving", "Stream", "Tally", "draw", "faults", "send", "send_all"]

HANGS_AFTER_SECONDS = 180.0
_CHANNELS = 4


class Leaving(enum.StrEnum):
    """How a stream ends for its caller."""

    STAYS = "stays"
    EARLY = "early"
    """Cancelled soon after it was sent, while it is decoded or queued as a rule."""
    READS = "reads"
    """Cancelled once some messages were read."""
    LINGERS = "lingers"
    """Cancelled a while after the prediction, in the middle of its maps or between chunks."""
    HURRIES = "hurries"
    """Its deadline comes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One of them.

    Attributes:
        number: which its input stands for.
        kind: what it asks.
        model: whom.
        leaving: how it ends.
        messages: how many are read by a caller that reads some.
        patience_seconds: of a caller that leaves early, lingers or hurries.
    """

    number: int
    kind: Kind
    model: str
    leaving: Leaving
    messages: int
    patience_seconds: float


@dataclasses.dataclass(slots=True, kw_only=True)
class Tally:
    """What became of them.

    Attributes:
        ends: streams by how their callers left and the status they ended with.
        wrong: what was of another number, incomplete, or ended as it must not, in words.
        hung: streams that did not end in time.
    """

    ends: collections.Counter[tuple[Leaving, str]] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    hung: list[Stream] = dataclasses.field(default_factory=list)

    def of(self, leaving: Leaving) -> set[str]:
        """The statuses with which streams of this kind ended."""
        return {status for (left, status), count in self.ends.items() if left is leaving and count}


def draw(count: int, seed: int) -> Iterator[Stream]:
    """So many streams, half of which leave."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    leaving = [Leaving.EARLY, Leaving.READS, Leaving.LINGERS, Leaving.HURRIES]
    for number in range(count):
        left = Leaving.STAYS if chance.random() < 0.5 else chance.choice(leaving)
        longest = 0.1 if left is Leaving.HURRIES else 0.03
        yield Stream(
            number=number,
            kind=chance.choices(list(Kind), weights=(6, 2, 2))[0],
            model=chance.choice(MODELS),
            leaving=left,
            messages=chance.randint(1, 3),
            patience_seconds=chance.uniform(0.001, longest),
        )


async def send_all(target: str, streams: Iterator[Stream], *, concurrency: int, is_checked: bool = True) -> Tally:
    """Sends all of them, so many at a time, each as soon as another has ended.

    Args:
        target: where to.
        streams: in order.
        concurrency: at a time.
        is_checked: whether answers tell whose they are.
    """
    tally = Tally()
    async with contextlib.AsyncExitStack() as channels:
        # Channels with the same arguments share one connection unless they are told not to.
        options = [("grpc.use_local_subchannel_pool", 1)]
        stubs = [
            explanation_service_pb2_grpc.ExplanationServiceStub(
                await channels.enter_async_context(grpc.aio.insecure_channel(target, options))
            )
            for _ in range(_CHANNELS)
        ]

        async def one_after_another(stub: explanation_service_pb2_grpc.ExplanationServiceStub) -> None:
            for stream in streams:
                try:
                    async with asyncio.timeout(HANGS_AFTER_SECONDS):
                        messages, status = await send(stub, stream)
                except TimeoutError:
                    tally.hung.append(stream)
                    continue
                tally.ends[stream.leaving, status] += 1
                if is_checked:
                    tally.wrong += faults(stream, messages, status)

        async with asyncio.TaskGroup() as group:
            for place in range(concurrency):
                group.create_task(one_after_another(stubs[place % _CHANNELS]))
    return tally


async def send(
    stub: explanation_service_pb2_grpc.ExplanationServiceStub, stream: Stream
) -> tuple[list[service_pb2.ExplainResponse], str]:
    """Sends one and takes of it what its caller stays for; what came, and the status."""
    call = stub.Explain(
        request(stream.number, stream.kind, stream.model),
        timeout=stream.patience_seconds if stream.leaving is Leaving.HURRIES else None,
    )
    most = {Leaving.EARLY: 0, Leaving.READS: stream.messages, Leaving.LINGERS: 1}.get(stream.leaving)
    messages: list[service_pb2.ExplainResponse] = []
    try:
        while most is None or len(messages) < most:
            message = await call.read()
            if message is grpc.aio.EOF:
                break
            messages.append(message)
    except grpc.aio.AioRpcError:
        pass  # Its status is told below.
    if stream.leaving in {Leaving.EARLY, Leaving.LINGERS}:
        # The moment is what is drawn: there is nothing to wait for.
        await asyncio.sleep(stream.patience_seconds)
    if most is not None:
        call.cancel()
    return messages, (await call.code()).name


def faults(stream: Stream, messages: Sequence[service_pb2.ExplainResponse], status: str) -> list[str]:
    """What was wrong with an answer, in words: of another number, or not whole though its caller stayed."""
    told = foreign(stream.number, stream.kind, messages)
    if stream.leaving is Leaving.STAYS and not (status == "OK" and is_complete(messages)):
        told.append(f"{stream} stayed and got {len(messages)} messages and {status}")
    return told

"""Sends a mix of requests under a load and records what became of each: `await run_step(connections, mix, Open(rate=20), …)`.

`sweep.py` calls it step after step, and so may tests and benchmarks. One event loop sends and receives; requests are serialised
beforehand and heatmaps are not decoded, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio

from camserve.client import channels
from camserve.client.bench.arrivals import poisson
from camserve.client.bench.mix import Mix
from camserve.client.bench.records import NOT_SENT, Closed, Failure, Load, Open, Record, Step, Window
from camserve.client.credentials import ANONYMOUS, Credentials
from camserve.client.errors import CamserveError, Internal, Unavailable, from_rpc_error, from_status
from camserve.client.results import Summary, event_from_proto
from camserve.v1 import explanation_service_pb2, heatmap_pb2

_SERVICE: Final = explanation_service_pb2.DESCRIPTOR.services_by_name["ExplanationService"]
_EXPLAIN: Final = f"/{_SERVICE.full_name}/Explain"
# Without it gRPC gives channels to one address the same connection.
_OWN_CONNECTION: Final = ("grpc.use_local_subchannel_pool", 1)
# A caller that was turned away with no time to come back; asking at once would only heat the server's door.
_PAUSE_SECONDS: Final = 0.05
_TURNED_AWAY: Final = frozenset({"RESOURCE_EXHAUSTED", "UNAVAILABLE"})


class Connections:
    """Several connections to one server, used in turn: `async with Connections("localhost:50051", count=4) as connections`.

    Entering returns when all are made; they belong to the running event loop.

    Args:
        target: address of the server.
        count: how many HTTP/2 connections.
        timeout_seconds: gRPC's limit for each request, or None. A deadline for the server belongs to the mix.
        credentials: as for `Client`.
        connect_seconds: how long making them may take; `Unavailable` is raised after that.
    """

    def __init__(
        self,
        target: str,
        *,
        count: int = 1,
        timeout_seconds: float | None = 30.0,
        credentials: Credentials = ANONYMOUS,
        connect_seconds: float = 10.0,
    ) -> None:
        if count < 1:
            raise ValueError(f"count is {count}; there is at least 1 connection")
        self.target = target
        self.count = count
        self._timeout_seconds = timeout_seconds
        self._credentials = credentials
        self._connect_seconds = connect_seconds
        self._channels: list[grpc.aio.Channel] = []
        self._calls: Iterator[Any] = iter(())

    async def __aenter__(self) -> Self:
        options = [*channels.options_of(self._credentials), _OWN_CONNECTION]
        for _ in range(self.count):
            self._channels.append(
                grpc.aio.secure_channel(self.target, self._credentials.channel_credentials(), options)
                if self._credentials.uses_tls
                else grpc.aio.insecure_channel(self.target, options)
            )
        try:
            async with asyncio.timeout(self._connect_seconds):
                await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        except TimeoutError as error:
            await self._close()
            raise Unavailable("UNAVAILABLE", "", f"no connection to {self.target}") from error
        self._calls = itertools.cycle([channel.unary_stream(_EXPLAIN) for channel in self._channels])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    def explain(self, message: bytes) -> Any:
        """Sends a serialised request over the next connection and returns gRPC's call."""
        return next(self._calls)(message, timeout=self._timeout_seconds, metadata=self._credentials.metadata())

    async def _close(self) -> None:
        for channel in self._channels:
            await channel.close(grace=None)
        self._channels.clear()


@dataclasses.dataclass(slots=True)
class Progress:
    """How a step fares, for whoever shows it while it runs; `run_step` keeps it up to date.

    Attributes:
        in_flight: requests under way.
        answered: requests answered in full since the step began.
        failed: requests that failed, or one of whose specs did.
        not_sent: requests that were due and not sent.
    """

    in_flight: int = 0
    answered: int = 0
    failed: int = 0
    not_sent: int = 0


async def run_step(
    connections: Connections,
    mix: Mix,
    load: Load,
    window: Window,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
) -> Step:
    """Offers one load and records every request.

    Args:
        connections: to whom.
        mix: what.
        load: how.
        window: how long.
        seed: of arrivals and draws.
        progress: is kept up to date.
        stop: when it is set, the step ends at once; what is under way is cancelled and not recorded.

    Returns:
        The records, with times from the start of the window.
    """
    return await _Run(connections, mix, load, window, seed, progress or Progress()).step(stop or asyncio.Event())


class _Run:
    """One step while it runs. Records hold the loop's own times until the window's start is known."""

    def __init__(
        self,
        connections: Connections,
        mix: Mix,
        load: Load,
        window: Window,
        seed: int,
        progress: Progress,
    ) -> None:
        self._connections = connections
        self._draws = mix.draws(seed)
        self._load = load
        self._seeds = itertools.count(seed)
        self._window = window
        self._progress = progress
        self._clock = asyncio.get_running_loop().time
        self._origin = 0.0
        self._records: list[Record] = []

    async def step(self, stop: asyncio.Event) -> Step:
        """Runs to the end or until it is stopped."""
        window = self._window
        wall, processor = time.monotonic(), time.thread_time()
        self._origin = self._clock() + window.warm_up_seconds
        working = asyncio.create_task(self._work())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            is_complete = working.done()
            passed = max(self._clock() - self._origin, 0.0)
            if is_complete:
                await working  # Raises what it raised.
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)
        records = [_from_origin(record, self._origin) for record in self._records]
        if window.requests is not None and is_complete:
            passed = max(record.ended for record in records)
        return Step(
            load=self._load,
            seconds=passed if window.seconds is None else min(window.seconds, passed),
            records=records,
            loop_seconds=time.thread_time() - processor,
            wall_seconds=time.monotonic() - wall,
            is_complete=is_complete,
        )

    async def _work(self) -> None:
        window = self._window
        if window.seconds is not None:
            await self._offer(self._origin + window.seconds, None)
            return
        if window.warm_up_seconds > 0:
            await self._offer(self._origin, None)
            self._origin = self._clock()  # The last of the warm-up ended later than planned.
        await self._offer(None, window.requests)

    async def _offer(self, until: float | None, count: int | None) -> None:
        """Offers the load up to a time or a number of requests, and waits for the last answer."""
        left: Iterator[int] = itertools.count() if count is None else iter(range(count))
        async with asyncio.TaskGroup() as group:
            if isinstance(self._load, Closed):
                for _ in range(self._load.concurrency):
                    group.create_task(self._call_again(self._load, until, left))
            else:
                await self._send_when_due(self._load, until, left, group)

    async def _call_again(self, load: Closed, until: float | None, left: Iterator[int]) -> None:
        """One caller of a closed loop."""
        while (until is None or self._clock() < until) and next(left, None) is not None:
            record = await self._send(self._clock())
            if record.code in _TURNED_AWAY and load.heeds_retry_after:
                pause = _PAUSE_SECONDS if record.retry_after is None else record.retry_after
                await asyncio.sleep(pause if until is None else min(pause, max(until - self._clock(), 0.0)))

    async def _send_when_due(
        self, load: Open, until: float | None, left: Iterator[int], group: asyncio.TaskGroup
    ) -> None:
        """The callers of an open loop."""
        start = self._clock()
        for _, arrival in zip(left, poisson(load.rate, next(self._seeds)), strict=False):
            due = start + arrival
            if until is not None and due >= until:
                break
            # Also where it is late: answers must be read meanwhile.
            await asyncio.sleep(max(due - self._clock(), 0.0))
            if self._progress.in_flight >= load.max_in_flight:
                kind = next(self._draws).kind
                self._note(Record(kind=kind, intended=due, sent=None, first=None, ended=due, code=NOT_SENT))
            else:
                group.create_task(self._send(due))

    async def _send(self, intended: float) -> Record:
        draw = next(self._draws)
        self._progress.in_flight += 1
        try:
            sent = self._clock()
            answer = _Answer(self._clock)
            code, reason, retry_after = "OK", "", None
            try:
                await answer.read(self._connections.explain(draw.message))
            except CamserveError as error:
                code, reason, retry_after = error.code, error.reason, error.retry_after
            record = Record(
                kind=draw.kind,
                intended=intended,
                sent=sent,
                first=answer.first,
                ended=self._clock(),
                code=code,
                reason=reason,
                retry_after=retry_after,
                spec_errors=tuple(answer.spec_errors),
                maps=answer.maps,
                partial_maps=answer.partial_maps,
                batch_rows=None if answer.summary is None else answer.summary.batch_rows,
                timings=None if answer.summary is None else answer.summary.timings,
                received_bytes=answer.received_bytes,
            )
        finally:
            self._progress.in_flight -= 1
        self._note(record)
        return record

    def _note(self, record: Record) -> None:
        self._records.append(record)
        if record.code == NOT_SENT:
            self._progress.not_sent += 1
        elif record.is_ok:
            self._progress.answered += 1
        else:
            self._progress.failed += 1


class _Answer:
    """What has arrived of one answer. Maps are counted and not decoded: their values are nobody's concern here."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.first: float | None = None
        self.spec_errors: list[Failure] = []
        self.maps = 0
        self.partial_maps = 0
        self.received_bytes = 0
        self.summary: Summary | None = None

    async def read(self, call: Any) -> None:
        """Reads to the end; raises the typed error of a failed call, and Internal for an answer that was cut off."""
        try:
            async for data in call:
                if self.first is None:
                    self.first = self._clock()
                self._take(data)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()
        if self.summary is None:
            raise Internal("INTERNAL", "STREAM_INCOMPLETE", "the stream ended before its summary had arrived")

    def _take(self, data: bytes) -> None:
        self.received_bytes += len(data)
        response = explanation_service_pb2.ExplainResponse.FromString(data)
        match response.WhichOneof("event"):
            case "heatmap":
                self.maps += 1
                self.partial_maps += heatmap_pb2.MAP_FLAG_PARTIAL in response.heatmap.flags
            case "spec_error":
                error = from_status(response.spec_error.status)
                self.spec_errors.append(Failure(error.code, error.reason))
            case "summary":
                event = event_from_proto(response, None)
                self.summary = event if isinstance(event, Summary) else None


def _from_origin(record: Record, origin: float) -> Record:
    """Returns a record with its times counted from the start of the window."""
    return dataclasses.replace(
        record,
        intended=record.intended - origin,
        sent=None if record.sent is None else record.sent - origin,
        first=None if record.first is None else record.first - origin,
        ended=record.ended - origin,
    )

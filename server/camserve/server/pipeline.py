"""The life of one request on one screen: door, decode, queue, prediction, maps, encode, summary.

`service.py` iterates over `Pipeline.explain` on the event loop and sends each event as it comes. Leaving the iteration, by
cancellation, deadline or error, abandons what is still to be done.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Self, TypeVar

from camserve.server import jobs
from camserve.server.decode import DecodeLimits, measure
from camserve.server.demand import demand_of
from camserve.server.door import Door
from camserve.server.encode import encode, is_quickly_encoded, needs_source
from camserve.server.errors import CamserveError, DeadlineExceeded, ExecutionFailed, Reason, at_field
from camserve.server.footprint import held_bytes
from camserve.server.intake import is_quickly_taken_in, take_in
from camserve.server.metrics import Metrics
from camserve.server.models.card import ModelCard
from camserve.server.models.repository import ServedModel
from camserve.server.prediction import predict
from camserve.server.queue import DeviceQueue
from camserve.server.replies import Reply, RowForwarded
from camserve.server.validate import most_maps

__all__ = ["Pipeline", "encoded"]

_T = TypeVar("_T")


class Pipeline:
    """Joins the stages. Holds no request state of its own."""

    def __init__(
        self,
        *,
        door: Door,
        queue: DeviceQueue,
        workers: concurrent.futures.Executor,
        decode_limits: DecodeLimits,
        metrics: Metrics,
    ) -> None:
        self._door = door
        self._queue = queue
        self._workers = workers
        self._decode_limits = decode_limits
        self._metrics = metrics

    async def explain(self, job: jobs.Job, model: ServedModel) -> AsyncGenerator[jobs.Event, None]:
        """Yields the prediction, then each heatmap or failed spec, then the summary.

        Raises:
            CamserveError: the request as a whole cannot be answered.
        """
        clock = _Clock(job, self._metrics)
        demand = demand_of(job, model)
        with self._door.enter(_held_bytes(job, model, self._decode_limits), demand), model.guests.enter():
            with clock.stage("decode"), self._queue.announced(demand):
                work = functools.partial(take_in, job, model.card, self._decode_limits)
                job, sample = work() if is_quickly_taken_in(job) else await self._in_worker(work, job.deadline)
            self._metrics.decode_seconds.labels(job.model).observe(sample.decode_seconds)
            reply = Reply(job.deadline)
            entry = self._queue.put(demand, job, sample, reply, time.monotonic())
            try:
                async for event in self._answers(job, model, sample, reply, entry.waiting.enqueued_at, clock):
                    yield event
            finally:
                reply.abandon()
                self._queue.drop(entry)

    async def _answers(
        self, job: jobs.Job, model: ServedModel, sample: jobs.Sample, reply: Reply, enqueued_at: float, clock: _Clock
    ) -> AsyncIterator[jobs.Event]:
        with clock.stage("queue"):
            forwarded = await reply.next()
        if not isinstance(forwarded, RowForwarded):
            raise ExecutionFailed(
                Reason.INTERNAL, f"this is a bug: {type(forwarded).__name__} came before the prediction"
            )
        queue_seconds = forwarded.started_at - enqueued_at
        self._metrics.queue_seconds.labels(job.model).observe(queue_seconds)
        self._metrics.first_message_seconds.labels(job.model).observe(time.monotonic() - job.received_at)
        yield predict(forwarded.reading, model.card, job.top_k, sample.geometry)

        map_seconds = encode_seconds = 0.0
        seen: set[tuple[int, int]] = set()
        while True:
            with clock.stage("device"):
                outcome = await reply.next()
            match outcome:
                case jobs.RawMap() | jobs.SpecFailed() if not _is_new(outcome, seen):
                    continue
                case jobs.RawMap():
                    map_seconds += outcome.device_seconds
                    with clock.stage("encode"):
                        work = functools.partial(encoded, outcome, job, model.card, sample)
                        is_quick = is_quickly_encoded(outcome, job.specs[outcome.spec_index])
                        event = work() if is_quick else await self._in_worker(work, job.deadline)
                    if isinstance(event, jobs.Heatmap):
                        encode_seconds += event.encode_seconds
                        self._metrics.encode_seconds.labels(event.encoding).observe(event.encode_seconds)
                    self._count(event, job)
                    yield event
                case jobs.SpecFailed():
                    self._count(outcome, job)
                    yield outcome
                case jobs.PassFacts():
                    total = time.monotonic() - job.received_at
                    self._metrics.request_seconds.labels(job.model).observe(total)
                    yield jobs.Summary(
                        job=job,
                        model_sha256=model.card.model_sha256,
                        facts=outcome,
                        decode_seconds=sample.decode_seconds,
                        queue_seconds=queue_seconds,
                        map_seconds=map_seconds,
                        encode_seconds=encode_seconds,
                        total_seconds=total,
                    )
                    return
                case RowForwarded():
                    continue

    async def _in_worker(self, work: Callable[[], _T], deadline: float | None) -> _T:
        async with asyncio.timeout_at(deadline):
            return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def _count(self, event: jobs.Event, job: jobs.Job) -> None:
        match event:
            case jobs.Heatmap():
                if event.raw.target.rank == event.raw.target.count - 1:
                    self._metrics.explanations.labels(job.model, event.method, "ok").inc()
            case jobs.SpecFailed():
                method = job.specs[event.spec_index].method
                self._metrics.explanations.labels(job.model, method, event.error.reason).inc()


def encoded(raw: jobs.RawMap, job: jobs.Job, card: ModelCard, sample: jobs.Sample) -> jobs.Heatmap | jobs.SpecFailed:
    """Encodes one map as its spec asks; what cannot be sent in that form becomes the spec's failure."""
    spec = job.specs[raw.spec_index]
    shape = sample.tensor.shape
    try:
        return encode(
            raw,
            spec,
            label=card.label(raw.target.class_index),
            geometry=sample.geometry,
            source=sample.source,
            input_size=(shape[1], shape[2]) if len(shape) == 3 else None,
        )
    except CamserveError as error:
        return jobs.SpecFailed(spec_index=raw.spec_index, error=error.at(f"specs[{raw.spec_index}]"))


class _Clock:
    """Tells at which stage a request ended early: one whose caller left, and one whose deadline passed."""

    def __init__(self, job: jobs.Job, metrics: Metrics) -> None:
        self._received_at = job.received_at
        self._metrics = metrics
        self._stage = ""

    def stage(self, name: str) -> Self:
        """Counts a cancellation or an expiry inside the `with` block under this stage's name.

        Raises:
            DeadlineExceeded: in place of the TimeoutError of whatever was awaited.
        """
        self._stage = name
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, asyncio.CancelledError | TimeoutError):
            return
        self._metrics.cancelled.labels(self._stage).inc()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(
                Reason.DEADLINE_EXCEEDED,
                f"the deadline passed {time.monotonic() - self._received_at:.3f} s after arrival; give it longer or send less",
            ) from error


def _is_new(outcome: jobs.RawMap | jobs.SpecFailed, seen: set[tuple[int, int]]) -> bool:
    """False for what was sent before: a pass that failed late, say for want of memory, is run again in halves."""
    rank = outcome.target.rank if isinstance(outcome, jobs.RawMap) else -1
    key = (outcome.spec_index, rank)
    is_new = key not in seen
    seen.add(key)
    return is_new


def _held_bytes(job: jobs.Job, model: ServedModel, limits: DecodeLimits) -> int:
    """What the request keeps in memory at its worst; only the headers of its inputs are looked at."""
    source_maps = sum(
        most_maps(spec, model.card) for spec in job.specs if needs_source(spec) or spec.size is jobs.MapSize.SOURCE
    )
    with at_field(job.payload.FIELD):
        held = held_bytes(
            job.payload,
            model.card.recipe,
            pixels=measure(job.payload, limits),
            keep_source=any(needs_source(spec) for spec in job.specs),
            source_size_maps=source_maps,
        )
    for spec in job.specs:
        if isinstance(spec.target.about, jobs.Reference):
            with at_field(f"specs[{spec.index}].target.embedding"):
                held += _reference_bytes(spec.target.about.payload, model, limits)
    return held + sum(len(extra.data) * 2 for extra in job.extra_inputs.values())


def _reference_bytes(payload: jobs.JobInput, model: ServedModel, limits: DecodeLimits) -> int:
    pixels = measure(payload, limits)
    return held_bytes(payload, model.card.recipe, pixels=pixels, keep_source=False, source_size_maps=0)

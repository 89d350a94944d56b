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
from camserve.server.replies import Outcome, Reply, RowForwarded
from camserve.server.rules import Standing
from camserve.server.tracing import UNTRACED, RequestTrace
from camserve.server.validate import most_maps

__all__ = ["Pipeline", "encoded"]

_T = TypeVar("_T")

# Stages that do something; of those that only wait, others tell more.
_WORK = frozenset({"decode", "encode"})


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

    async def explain(
        self, job: jobs.Job, model: ServedModel, trace: RequestTrace = UNTRACED
    ) -> AsyncGenerator[jobs.Event, None]:
        """Yields the prediction, then each heatmap or failed spec, then the summary.

        Raises:
            CamserveError: the request as a whole cannot be answered.
        """
        clock = _Clock(job, self._metrics, trace)
        demand = demand_of(job, model)
        with self._door.enter(_held_bytes(job, model, self._decode_limits), demand), model.guests.enter():
            with clock.stage("decode"), self._queue.announced(demand):
                work = functools.partial(take_in, job, model.card, self._decode_limits)
                job, sample = work() if is_quickly_taken_in(job) else await self._in_worker(work, job.deadline)
            self._metrics.decode_seconds.labels(job.model, job.version).observe(sample.decode_seconds)
            reply = Reply(job.deadline)
            entry = self._queue.put(demand, job, sample, reply, time.monotonic(), trace)
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
        clock.was_at("queue", enqueued_at, forwarded.started_at)
        self._metrics.queue_seconds.labels(job.model, job.version).observe(queue_seconds)
        self._metrics.first_message_seconds.labels(job.model).observe(time.monotonic() - job.received_at)
        yield predict(forwarded.reading, model.card, job.top_k, sample.geometry)

        answer = _Answer(job, sample, model, queue_seconds)
        while True:
            with clock.stage("device"):
                outcome = await answer.next(reply)
            if outcome is None:
                for failure in answer.standing.give_up(forwarded.reading):
                    yield self._counted(answer.standing.told(failure), job)
                outcome = forwarded.facts
            match outcome:
                case jobs.RawMap() | jobs.SpecFailed():
                    if answer.is_new(outcome):
                        with clock.stage("encode", spec=outcome.spec_index):
                            event = await self._made(outcome, job, model, sample)
                        answer.note(outcome, event)
                        yield self._counted(answer.standing.told(event), job)
                case jobs.PassFacts():
                    summary = answer.summary(outcome)
                    self._count_request(summary)
                    yield summary
                    return
                case RowForwarded():
                    continue

    async def _made(
        self, outcome: jobs.RawMap | jobs.SpecFailed, job: jobs.Job, model: ServedModel, sample: jobs.Sample
    ) -> jobs.Heatmap | jobs.SpecFailed:
        """The outcome as it is sent."""
        if isinstance(outcome, jobs.SpecFailed):
            return outcome
        work = functools.partial(encoded, outcome, job, model.card, sample)
        is_quick = is_quickly_encoded(outcome, job.specs[outcome.spec_index])
        return work() if is_quick else await self._in_worker(work, job.deadline)

    async def _in_worker(self, work: Callable[[], _T], deadline: float | None) -> _T:
        async with asyncio.timeout_at(deadline):
            return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def _counted(self, event: jobs.Heatmap | jobs.SpecFailed, job: jobs.Job) -> jobs.Heatmap | jobs.SpecFailed:
        match event:
            case jobs.Heatmap():
                self._metrics.encode_seconds.labels(event.encoding).observe(event.encode_seconds)
                if event.raw.target.rank == event.raw.target.count - 1:
                    self._metrics.explanations.labels(job.model, event.method, "ok").inc()
            case jobs.SpecFailed():
                method = job.specs[event.spec_index].method
                self._metrics.explanations.labels(job.model, method, event.error.reason).inc()
        return event

    def _count_request(self, summary: jobs.Summary) -> None:
        model = summary.job.model
        self._metrics.request_seconds.labels(model, summary.job.version).observe(summary.total_seconds)
        for verdict in summary.rules:
            self._metrics.rules.labels(model, verdict.rule, verdict.outcome).inc()


class _Answer:
    """What has been told of one request behind its prediction, and what it took.

    Attributes:
        standing: of the model's rules.
    """

    def __init__(self, job: jobs.Job, sample: jobs.Sample, model: ServedModel, queue_seconds: float) -> None:
        self.standing = Standing(job)
        self._job = job
        self._sample = sample
        self._model = model
        self._queue_seconds = queue_seconds
        self._map_seconds = self._encode_seconds = 0.0
        self._seen: set[tuple[int, int]] = set()

    async def next(self, reply: Reply) -> Outcome | None:
        """The next outcome; None where only what rules add is still to come, and the deadline so near that the answer must go."""
        until = self.standing.give_up_at
        if until is None or not self.standing.waits_for_rules_only:
            return await reply.next()
        try:
            async with asyncio.timeout_at(until):
                return await reply.next()
        except TimeoutError:
            return None

    def is_new(self, outcome: jobs.RawMap | jobs.SpecFailed) -> bool:
        """False for what was sent before: a pass that failed late, say for want of memory, is run again in halves."""
        rank = outcome.target.rank if isinstance(outcome, jobs.RawMap) else -1
        key = (outcome.spec_index, rank)
        is_new = key not in self._seen and not self.standing.is_over(outcome.spec_index)
        self._seen.add(key)
        return is_new

    def note(self, outcome: jobs.RawMap | jobs.SpecFailed, event: jobs.Heatmap | jobs.SpecFailed) -> None:
        """What an outcome took, as it is sent."""
        if isinstance(outcome, jobs.RawMap):
            self._map_seconds += outcome.device_seconds
        if isinstance(event, jobs.Heatmap):
            self._encode_seconds += event.encode_seconds

    def summary(self, facts: jobs.PassFacts) -> jobs.Summary:
        """Closes it."""
        return jobs.Summary(
            job=self._job,
            model_sha256=self._model.card.model_sha256,
            facts=facts,
            decode_seconds=self._sample.decode_seconds,
            queue_seconds=self._queue_seconds,
            map_seconds=self._map_seconds,
            encode_seconds=self._encode_seconds,
            total_seconds=time.monotonic() - self._job.received_at,
            rules=self.standing.verdicts(),
        )


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
        return jobs.SpecFailed(spec_index=raw.spec_index, error=error.at(job.path(raw.spec_index)))


class _Clock:
    """Tells a request's stages to its trace, and at which one it ended early: its caller left, or its deadline passed."""

    def __init__(self, job: jobs.Job, metrics: Metrics, trace: RequestTrace) -> None:
        self._received_at = job.received_at
        self._metrics = metrics
        self._trace = trace
        self._stage = ""
        self._began_at = 0.0
        self._facts: dict[str, int] = {}

    def stage(self, name: str, **facts: int) -> Self:
        """Counts a cancellation or an expiry inside the `with` block under this stage's name.

        Raises:
            DeadlineExceeded: in place of the TimeoutError of whatever was awaited.
        """
        self._stage, self._facts, self._began_at = name, facts, time.monotonic()
        return self

    def was_at(self, name: str, began_at: float, ended_at: float) -> None:
        """A stage that is only known when it is over."""
        self._trace.stage(name, began_at, ended_at)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        overdue = None
        if isinstance(error, TimeoutError):
            overdue = DeadlineExceeded(
                Reason.DEADLINE_EXCEEDED,
                f"the deadline passed {time.monotonic() - self._received_at:.3f} s after arrival; give it longer or send less",
            )
        if error is not None or self._stage in _WORK:
            self._trace.stage(self._stage, self._began_at, time.monotonic(), overdue or error, **self._facts)
        if isinstance(error, asyncio.CancelledError | TimeoutError):
            self._metrics.cancelled.labels(self._stage).inc()
        try:
            if overdue is not None:
                raise overdue from error
        finally:
            # An error that its own frame holds keeps it, and with it the request, until somebody collects garbage.
            del overdue


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

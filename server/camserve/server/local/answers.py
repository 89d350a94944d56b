"""The life of one request without a server: intake, pass, amplified work, encoding, summary, in the caller's own thread.

`explainer.py` hands in a validated `Job`; the events that a server would send leave one by one. What `pipeline.py` and
`runner.py` do for many requests at once is done here for one.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from camserve.server import jobs
from camserve.server.decode import DecodeLimits
from camserve.server.engine.passes import Amplification, Closed, Forwarded, Mapped, run_pass
from camserve.server.errors import CamserveError, DeadlineExceeded, Reason
from camserve.server.failures import not_finite, row_failure
from camserve.server.intake import take_in
from camserve.server.models.repository import ServedModel
from camserve.server.pipeline import encoded
from camserve.server.prediction import predict
from camserve.server.rules import Standing

__all__ = ["answers"]


def answers(job: jobs.Job, model: ServedModel, limits: DecodeLimits, *, batch_rows: int = 1) -> Iterator[jobs.Event]:
    """Yields the prediction, then each heatmap or failed spec, then the summary.

    Args:
        job: validated.
        model: loaded.
        limits: of every input.
        batch_rows: how many rows the pass has, all copies of this one: the number moves the last bits of float32 results.

    Raises:
        CamserveError: the request as a whole cannot be answered.
    """
    job, sample = take_in(job, model.card, limits)
    return _Answer(job, sample, model, batch_rows).events()


class _Answer:
    """One request under way, and what it took so far."""

    def __init__(self, job: jobs.Job, sample: jobs.Sample, model: ServedModel, batch_rows: int) -> None:
        self._job = job
        self._sample = sample
        self._model = model
        self._rows = max(batch_rows, model.card.static_batch_rows or 0)
        self._map_seconds = 0.0
        self._encode_seconds = 0.0
        self._closed: Closed | None = None
        self._standing = Standing(job)

    def events(self) -> Iterator[jobs.Event]:
        """As `answers`."""
        works: collections.deque[Amplification] = collections.deque()
        for event in self._shared_pass():
            match event:
                case Forwarded():
                    if not event.finite[0]:
                        raise not_finite(self._job.model)
                    yield predict(event.readings[0], self._model.card, self._job.top_k, self._sample.geometry)
                case Mapped():
                    yield self._finished(event.result)
                case Amplification():
                    works.append(event)
                case Closed():
                    self._closed = event
        while works:
            # In turn, as on a server: a deadline then leaves something of each.
            work = works.popleft()
            for result in self._advanced(work, waiting=len(works)):
                yield self._finished(result)
            if not work.is_done:
                works.append(work)
        yield self._summary()

    def _shared_pass(self) -> Iterator[Forwarded | Mapped | Amplification | Closed]:
        samples = self._sample
        specs = [self._job.specs, *[()] * (self._rows - 1)]
        extras = [self._repeated(samples.extras[extra.name]) for extra in self._model.card.extra_inputs]
        try:
            tensor = self._repeated(samples.tensor)
            for event in run_pass(self._model.pass_model, tensor, specs, extras=extras, is_due=self._is_due):
                self._check_deadline()
                yield event
        except Exception as error:
            raise row_failure(error, self._job.model) from error

    def _is_due(self, _row: int, spec_index: int, reading: jobs.Reading) -> bool:
        use = self._job.rule_of(spec_index)
        return use is None or use.is_due(reading)

    def _advanced(self, work: Amplification, *, waiting: int) -> Sequence[jobs.RawMap | jobs.SpecFailed]:
        """One chunk of amplified work, or its end when the deadline would pass before its next turn."""
        deadline = self._job.deadline
        turn = time.monotonic() + work.chunk_seconds * (waiting + 1)
        try:
            if deadline is not None and work.allows_partial and turn > deadline:
                return work.finish_now()
            self._check_deadline()
            return work.advance()
        except DeadlineExceeded:
            raise
        except Exception as error:  # noqa: BLE001 - a model is foreign code and may raise anything
            work.close()
            return [jobs.SpecFailed(spec_index=work.spec_index, error=row_failure(error, self._job.model))]

    def _finished(self, result: jobs.RawMap | jobs.SpecFailed) -> jobs.Heatmap | jobs.SpecFailed:
        if isinstance(result, jobs.SpecFailed):
            return self._standing.told(result)
        self._map_seconds += result.device_seconds
        heatmap = encoded(result, self._job, self._model.card, self._sample)
        if isinstance(heatmap, jobs.Heatmap):
            self._encode_seconds += heatmap.encode_seconds
        return self._standing.told(heatmap)

    def _summary(self) -> jobs.Summary:
        card, closed = self._model.card, self._closed
        if closed is None:
            raise CamserveError(Reason.INTERNAL, "this is a bug: the pass did not end")
        facts = jobs.PassFacts(
            rows=self._rows,
            explanations=closed.explanations,
            device=card.device,
            dtype=card.dtype,
            plan="tapped" if self._job.specs else "forward",
            forward_seconds=closed.forward_seconds,
            backward_seconds=closed.backward_seconds,
        )
        return jobs.Summary(
            job=self._job,
            model_sha256=card.model_sha256,
            facts=facts,
            decode_seconds=self._sample.decode_seconds,
            queue_seconds=0.0,
            map_seconds=self._map_seconds,
            encode_seconds=self._encode_seconds,
            total_seconds=time.monotonic() - self._job.received_at,
            rules=self._standing.verdicts(),
        )

    def _repeated(self, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([values] * self._rows))

    def _check_deadline(self) -> None:
        if self._job.deadline is not None and time.monotonic() > self._job.deadline:
            raise DeadlineExceeded(
                Reason.DEADLINE_EXCEEDED,
                f"the deadline passed {time.monotonic() - self._job.received_at:.3f} s after the request; give it longer or ask "
                "for less",
            )

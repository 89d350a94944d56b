"""One ModelInferRequest from its message to its outputs: read, run as jobs, told. Both calls that infer ask it.

On the event loop; inputs that are large are read in a worker thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from typing import Any, Final, TypeAlias

from camserve.server import jobs
from camserve.server.access import AccessRecord
from camserve.server.callers import current_caller
from camserve.server.callers.turnstile import Turnstile
from camserve.server.errors import CamserveError, InvalidRequest, Reason
from camserve.server.models.repository import Repository, ServedModel
from camserve.server.oip.answers import Maps, heatmap_output, prediction_outputs
from camserve.server.oip.requests import Asked, WantedHeatmap, all_predictions, read_request
from camserve.server.oip.rows import RowError, row_events
from camserve.server.oip.tensors import Output
from camserve.server.oip.terms import Terms
from camserve.server.pipeline import Pipeline
from camserve.server.validate import RequestLimits

__all__ = ["Explained", "Failed", "Inference", "Predicted", "Step"]

# Typed contents and parameters of so many bytes are read in about half a millisecond, and so many raw bytes copied.
_QUICK_READ_BYTES: Final = 65_536
_QUICK_BYTES: Final = 4 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the model said of all rows.

    Attributes:
        asked: the request.
        model: that answers.
        outputs: those of its own that were asked for.
    """

    asked: Asked
    model: ServedModel
    outputs: tuple[Output, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """A heatmap of all rows."""

    output: Output


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A heatmap that could not be made; the others go on."""

    name: str
    error: CamserveError


Step: TypeAlias = Predicted | Explained | Failed


class Inference:
    """Joins the front to the pipeline. Holds no request state.

    Args:
        repository: finds models.
        pipeline: answers jobs.
        limits: on specs and maps.
        workers: where large inputs are read.
        turnstile: counts the rows of callers.
    """

    def __init__(
        self,
        repository: Repository,
        pipeline: Pipeline,
        limits: RequestLimits,
        *,
        workers: Executor,
        turnstile: Turnstile,
    ) -> None:
        self._repository = repository
        self._pipeline = pipeline
        self._limits = limits
        self._workers = workers
        self._turnstile = turnstile

    async def steps(
        self,
        request: Any,
        terms: Terms,
        record: AccessRecord,
        deadline: float | None,
        *,
        always_predicts: bool = False,
    ) -> AsyncGenerator[Step, None]:
        """Yields the prediction, then each heatmap or its failure as they come.

        Args:
            request: a ModelInferRequest.
            terms: of it.
            record: of the call or the request; filled in.
            deadline: of the call, monotonic seconds.
            always_predicts: whether the prediction comes with all its outputs where only heatmaps are asked for.

        Raises:
            CamserveError: the request as a whole cannot be answered.
        """
        received_at = time.monotonic()
        if not request.model_name:
            raise InvalidRequest(
                Reason.FIELD_INVALID, "model_name is required; RepositoryIndex tells the names", field="model_name"
            )
        model = self._repository.get(request.model_name, request.model_version)
        record.model, record.version = model.card.name, model.card.version
        # A guest from here on: it must not be unloaded while inputs are read elsewhere.
        with model.guests.enter():
            asked = await self._read(request, terms, model, received_at=received_at, deadline=deadline)
            del request
            first = asked.jobs[0]
            record.specs, record.lane = len(first.specs), first.lane
            record.deadline = math.inf if first.deadline is None else first.deadline
            try:
                # One request of the caller's was counted with the call; each further row is one as well.
                with self._turnstile.request(first.caller, rows=len(asked.jobs), counted=1):
                    async with contextlib.aclosing(self._steps(asked, model, record, always_predicts)) as steps:
                        async for step in steps:
                            yield step
            except RowError as failed:
                error = failed.__cause__
                if isinstance(error, CamserveError):
                    raise asked.at_request(error, failed.row) from None
                raise error or failed from None

    async def _read(
        self, request: Any, terms: Terms, model: ServedModel, *, received_at: float, deadline: float | None
    ) -> Asked:
        """Reads inputs and outputs; here if that is quick, else in a worker thread."""
        read = functools.partial(
            read_request,
            request,
            terms,
            model.card,
            self._limits,
            received_at=received_at,
            deadline=deadline,
            caller=current_caller().name,
        )
        if _is_quickly_read(request):
            return read()
        del request
        return await asyncio.get_running_loop().run_in_executor(self._workers, read)

    async def _steps(
        self,
        asked: Asked,
        model: ServedModel,
        record: AccessRecord,
        always_predicts: bool,  # noqa: FBT001 - as in `steps`
    ) -> AsyncGenerator[Step, None]:
        predictions = asked.predictions or (all_predictions(model.card) if always_predicts else ())
        said: dict[int, jobs.Prediction] = {}
        wanted = {output.spec.index: output for output in asked.heatmaps}
        maps = {index: Maps(len(asked.jobs)) for index in wanted}
        async with contextlib.aclosing(row_events(self._pipeline, asked.jobs, model, record.trace)) as events:
            held: list[Step] = []
            async for row, event in events:
                match event:
                    case jobs.Prediction():
                        said[row] = event
                        if len(said) == len(asked.jobs):
                            rows = [said[place] for place in range(len(said))]
                            outputs = prediction_outputs(predictions, rows, model.card)
                            yield Predicted(asked=asked, model=model, outputs=tuple(outputs))
                            for step in held:
                                yield step
                    case jobs.Heatmap() | jobs.SpecFailed():
                        done = _step(row, event, asked, wanted, maps)
                        if done is not None and len(said) < len(asked.jobs):
                            held.append(done)
                        elif done is not None:
                            yield done
                    case jobs.Summary():
                        record.batch_rows = max(record.batch_rows, event.facts.rows)


def _is_quickly_read(request: Any) -> bool:
    read_bytes: int = sum(given.contents.ByteSize() for given in request.inputs)
    read_bytes += sum(output.ByteSize() for output in request.outputs)
    read_bytes += sum(value.ByteSize() for value in request.parameters.values())
    total_bytes: int = request.ByteSize()
    return read_bytes <= _QUICK_READ_BYTES and total_bytes <= _QUICK_BYTES


def _step(
    row: int,
    event: jobs.Heatmap | jobs.SpecFailed,
    asked: Asked,
    wanted: dict[int, WantedHeatmap],
    maps: dict[int, Maps],
) -> Step | None:
    """What an event of a row finishes, if anything; a heatmap that fails for one row has failed."""
    index = event.spec_index if isinstance(event, jobs.SpecFailed) else event.raw.spec_index
    output = wanted.get(index)
    if output is None:
        return None
    if isinstance(event, jobs.SpecFailed):
        del wanted[index]
        return Failed(name=output.name, error=asked.at_request(event.error, row))
    maps[index].add(row, event)
    if not maps[index].is_complete:
        return None
    del wanted[index]
    try:
        return Explained(output=heatmap_output(output, maps.pop(index).rows()))
    except InvalidRequest as error:
        return Failed(name=output.name, error=error)

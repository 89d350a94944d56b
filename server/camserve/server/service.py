"""The servicers: read the request, hand it to the pipeline, send what comes. Nothing else happens here.

Transport-neutral apart from their signatures: they use the context only for the deadline.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from camserve.server import jobs
from camserve.server.access import current_record
from camserve.server.callers import current_caller
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.models.lifecycle import Lifecycle
from camserve.server.models.repository import ModelState, Repository, ServedModel, Slot
from camserve.server.pipeline import Pipeline
from camserve.server.rules import apply_rules
from camserve.server.validate import RequestLimits, check_job, check_size
from camserve.server.wire.answers import card_message, response
from camserve.server.wire.requests import job_from_request, request_id_of
from camserve.v1 import (
    explanation_service_pb2,
    explanation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

__all__ = ["ExplanationServicer", "ModelServicer"]


class ExplanationServicer(explanation_service_pb2_grpc.ExplanationServiceServicer):
    """`camserve.v1.ExplanationService`."""

    def __init__(self, repository: Repository, pipeline: Pipeline, limits: RequestLimits) -> None:
        self._repository = repository
        self._pipeline = pipeline
        self._limits = limits

    async def Explain(  # noqa: N802 - the name is the contract's
        self, request: explanation_service_pb2.ExplainRequest, context: Any
    ) -> AsyncIterator[explanation_service_pb2.ExplainResponse]:
        """Streams prediction, maps and summary of one image."""
        received_at = time.monotonic()
        record = current_record()
        record.request_id = request_id_of(request)
        if not request.model:
            raise InvalidRequest(Reason.FIELD_INVALID, "model is required; ListModels tells the names", field="model")
        model = self._repository.get(request.model, request.version)
        record.model, record.version, record.specs = model.card.name, model.card.version, len(request.specs)
        check_size(len(request.specs), self._limits)
        remaining = context.time_remaining()
        job = job_from_request(
            request,
            model.card,
            request_id=record.request_id,
            received_at=received_at,
            deadline=None if remaining is None else received_at + remaining,
            caller=current_caller().name,
        )
        check_job(job, model.card, self._limits)
        record.lane = job.lane
        if not request.skip_rules:
            job = apply_rules(job, model.card)
        record.deadline = math.inf if job.deadline is None else job.deadline
        async with contextlib.aclosing(self._pipeline.explain(job, model, record.trace)) as events:
            async for event in events:
                if isinstance(event, jobs.Summary):
                    record.batch_rows = event.facts.rows
                    record.rules = sum(verdict.outcome is jobs.RuleOutcome.APPLIED for verdict in event.rules)
                yield response(event, model.card)


_STATES = {
    ModelState.LOADING: model_service_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_service_pb2.MODEL_STATE_READY,
    ModelState.FAILED: model_service_pb2.MODEL_STATE_FAILED,
    ModelState.UNLOADING: model_service_pb2.MODEL_STATE_UNLOADING,
    ModelState.UNLOADED: model_service_pb2.MODEL_STATE_UNLOADED,
}


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """`camserve.v1.ModelService`."""

    def __init__(self, repository: Repository, lifecycle: Lifecycle) -> None:
        self._repository = repository
        self._lifecycle = lifecycle

    async def ListModels(  # noqa: N802 - the name is the contract's
        self, _request: model_service_pb2.ListModelsRequest, _context: Any
    ) -> model_service_pb2.ListModelsResponse:
        """Lists every version of every model."""
        return model_service_pb2.ListModelsResponse(models=[self._status(slot) for slot in self._repository.slots()])

    async def GetModel(  # noqa: N802 - the name is the contract's
        self, request: model_service_pb2.GetModelRequest, _context: Any
    ) -> model_service_pb2.GetModelResponse:
        """Returns a card."""
        served = self._repository.get(_named(request), request.version)
        return model_service_pb2.GetModelResponse(card=self._card(served))

    async def LoadModel(  # noqa: N802 - the name is the contract's
        self, request: model_service_pb2.LoadModelRequest, _context: Any
    ) -> model_service_pb2.LoadModelResponse:
        """Loads a model from the repository and returns its card when it serves."""
        served = await self._lifecycle.load(_named(request), request.version)
        return model_service_pb2.LoadModelResponse(card=self._card(served))

    async def UnloadModel(  # noqa: N802 - the name is the contract's
        self, request: model_service_pb2.UnloadModelRequest, _context: Any
    ) -> model_service_pb2.UnloadModelResponse:
        """Unloads a model and returns when its memory is free."""
        await self._lifecycle.unload(_named(request), request.version)
        return model_service_pb2.UnloadModelResponse()

    def _status(self, slot: Slot) -> model_service_pb2.ModelStatus:
        card = slot.served.card if slot.served else None
        return model_service_pb2.ModelStatus(
            name=slot.name,
            version=slot.version,
            state=_STATES[slot.state],
            error=slot.error,
            class_count=card.class_count if card else 0,
            default_layer=card.default_layer if card else "",
            version_labels=self._repository.labels_of(slot.name, slot.version),
        )

    def _card(self, served: ServedModel) -> model_service_pb2.ModelCard:
        message = card_message(served.card)
        message.notes.extend(self._repository.troubles(served.card))
        return message


def _named(
    request: model_service_pb2.GetModelRequest
    | model_service_pb2.LoadModelRequest
    | model_service_pb2.UnloadModelRequest,
) -> str:
    if not request.model:
        raise InvalidRequest(Reason.FIELD_INVALID, "model is required; ListModels tells the names", field="model")
    return str(request.model)

"""`inference.GRPCInferenceService`: each call reads its request, asks whoever knows, and makes the reply.

`registration.py` gives the methods to gRPC; `CallInterceptor` is around them as around every call. Nothing of gRPC here but the
context's deadline.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from camserve.server.access import current_record
from camserve.server.errors import CamserveError, ExecutionFailed, InvalidRequest, Reason
from camserve.server.health import Health
from camserve.server.metrics import Metrics
from camserve.server.models.lifecycle import Lifecycle
from camserve.server.models.repository import Repository
from camserve.server.oip import messages, repository
from camserve.server.oip.inference import Explained, Failed, Inference, Predicted
from camserve.server.oip.metadata import EXTENSIONS, model_config, model_metadata
from camserve.server.oip.statistics import statistics
from camserve.server.oip.streams import Streams, Surroundings
from camserve.server.oip.tensors import Output, put_output
from camserve.server.oip.terms import read_terms

__all__ = ["InferenceServicer"]


class InferenceServicer:
    """The protocol's calls, by their names.

    Args:
        models: that are served.
        lifecycle: loads and unloads them.
        inference: answers requests.
        streams: answers streams of them.
        health: of the server.
        metrics: of the server.
    """

    def __init__(
        self,
        models: Repository,
        lifecycle: Lifecycle,
        inference: Inference,
        streams: Streams,
        *,
        health: Health,
        metrics: Metrics,
    ) -> None:
        self._models = models
        self._lifecycle = lifecycle
        self._inference = inference
        self._streams = streams
        self._health = health
        self._metrics = metrics

    async def ServerLive(self, _request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Tells whether the process works."""
        return messages.ServerLiveResponse(live=not self._health.stall)

    async def ServerReady(self, _request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Tells whether requests should be sent."""
        return messages.ServerReadyResponse(ready=not self._health.why_not_ready())

    async def ModelReady(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Tells whether a model answers; of one that is not known, that it does not."""
        try:
            self._models.get(request.name, request.version)
        except CamserveError:
            return messages.ModelReadyResponse(ready=False)
        return messages.ModelReadyResponse(ready=not self._health.why_silent())

    async def ServerMetadata(self, _request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Tells name, version and extensions."""
        return messages.ServerMetadataResponse(name="camserve", version=version("camserve"), extensions=EXTENSIONS)

    async def ModelMetadata(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Tells a model's inputs and outputs."""
        card = self._models.get(_named(request), request.version).card
        versions = [slot.version for slot in self._models.slots(card.name) if slot.served is not None]
        return model_metadata(card, versions)

    async def ModelConfig(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Tells what clients read of a configuration."""
        return model_config(self._models.get(_named(request), request.version).card)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Answers with every output at once; a heatmap that cannot be made fails the call."""
        record = current_record()
        terms = read_terms(request)
        record.request_id = terms.request_id
        request_id, deadline = request.id, _deadline(context)
        predicted: Predicted | None = None
        outputs: dict[str, Output] = {}
        steps = self._inference.steps(request, terms, record, deadline)
        del request  # Pictures are large; what is left of them is in the jobs.
        async with contextlib.aclosing(steps):
            async for step in steps:
                match step:
                    case Predicted():
                        predicted = step
                        outputs |= {output.name: output for output in step.outputs}
                    case Explained():
                        outputs[step.output.name] = step.output
                    case Failed():
                        raise step.error
        if predicted is None:
            raise ExecutionFailed(Reason.INTERNAL, "this is a bug: an answer ended without a prediction")
        card = predicted.model.card
        response = messages.ModelInferResponse(model_name=card.name, model_version=card.version, id=request_id)
        for wanted in predicted.asked.outputs:
            put_output(response, outputs[wanted.name])
        return response

    async def ModelStreamInfer(  # noqa: N802 - the name is the protocol's
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """Answers any number of requests as they finish; see `streams.py`."""
        record, metadata = current_record(), tuple(context.invocation_metadata() or ())
        deadline = _deadline(context)
        record.deadline = math.inf if deadline is None else deadline
        around = Surroundings(
            rpc=record.rpc,
            peer=record.peer,
            metadata=metadata,
            deadline=deadline,
            ends_on_error=dict(metadata).get("triton_grpc_error") == "true",
        )
        async with contextlib.aclosing(self._streams.replies(requests, around)) as replies:
            async for reply in replies:
                yield reply

    async def ModelStatistics(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Tells what was inferred so far, of one model or all, of one version or all that answer."""
        if request.name and (request.version or not self._models.answers(request.name)):
            served = [self._models.get(request.name, request.version)]
        else:
            served = [slot.served for slot in self._models.slots(request.name or None) if slot.served is not None]
        return statistics([model.card for model in served], self._metrics)

    async def RepositoryIndex(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Lists every version of every model."""
        return repository.index(self._models, request)

    async def RepositoryModelLoad(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Loads a model and answers when it serves."""
        named = repository.named(request)
        await self._lifecycle.load(named.model, named.version)
        return messages.RepositoryModelLoadResponse(model_name=named.model, is_loaded=True)

    async def RepositoryModelUnload(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the name is the protocol's
        """Unloads a model and answers when its memory is free."""
        named = repository.named(request)
        await self._lifecycle.unload(named.model, named.version)
        return messages.RepositoryModelUnloadResponse(model_name=named.model, is_unloaded=True)


def _deadline(context: Any) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _named(request: Any) -> str:
    if not request.name:
        raise InvalidRequest(Reason.FIELD_INVALID, "name is required; RepositoryIndex tells the names", field="name")
    return str(request.name)

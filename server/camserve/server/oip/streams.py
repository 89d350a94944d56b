"""A stream of requests and the stream of their replies: each request by itself, its prediction first, then each heatmap.

`servicer.py` hands in the messages of a call; replies leave when they are ready, matched by id. What goes wrong with one
request is told in band, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any, Final, TypeAlias

from google.rpc import error_details_pb2, status_pb2

from camserve.server.access import AccessRecord, current_record, open_record
from camserve.server.callers import current_caller
from camserve.server.callers.turnstile import Turnstile
from camserve.server.metrics import Metrics
from camserve.server.oip.inference import Explained, Failed, Inference, Predicted
from camserve.server.oip.messages import ModelStreamInferResponse
from camserve.server.oip.parameters import Value, parameter
from camserve.server.oip.tensors import Output, put_output
from camserve.server.oip.terms import read_terms
from camserve.server.statuses import status_for
from camserve.server.tracing import Tracer

__all__ = ["MOST_OPEN_REQUESTS", "Streams", "Surroundings"]

# A stream with so many requests under way is not read on; gRPC's flow control then stops whoever sends.
MOST_OPEN_REQUESTS: Final = 64
# Replies that wait for the reader; behind them requests wait where they are.
_MOST_WAITING_REPLIES: Final = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the requests of one stream have in common.

    Attributes:
        rpc: full name of the call.
        peer: address of the caller.
        metadata: of the call, for traces.
        deadline: of the call, monotonic seconds, or None.
        ends_on_error: whether the first error ends the stream with a status, in place of being told in band.
    """

    rpc: str
    peer: str
    metadata: tuple[tuple[str, str | bytes], ...]
    deadline: float | None
    ends_on_error: bool


# None: no further request comes and all are answered. An error: the stream ends with it.
_Item: TypeAlias = Any


class Streams:
    """Answers streams. Holds no state of any.

    Args:
        inference: answers requests.
        turnstile: counts them by caller.
        metrics: where they are counted.
        tracer: tells each of them.
    """

    def __init__(self, inference: Inference, turnstile: Turnstile, metrics: Metrics, tracer: Tracer) -> None:
        self._inference = inference
        self._turnstile = turnstile
        self._metrics = metrics
        self._tracer = tracer

    async def replies(self, requests: AsyncIterator[Any], around: Surroundings) -> AsyncGenerator[Any, None]:
        """Yields replies until the caller sends no more and all is answered; leaving the iteration abandons the rest.

        Raises:
            CamserveError: what came is no request; or one failed, and the stream is to end with the first error.
        """
        waiting: asyncio.Queue[_Item] = asyncio.Queue(_MOST_WAITING_REPLIES)
        reading = asyncio.create_task(self._read(requests, around, waiting))
        try:
            while (item := await waiting.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(self, requests: AsyncIterator[Any], around: Surroundings, waiting: asyncio.Queue[_Item]) -> None:
        """Takes requests while there is room; each is answered in a task, and so in a context, of its own."""
        room = asyncio.Semaphore(MOST_OPEN_REQUESTS)
        tasks: set[asyncio.Task[None]] = set()

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            room.release()

        try:
            while True:
                await room.acquire()
                try:
                    request = await anext(requests)
                except StopAsyncIteration:
                    break
                task = asyncio.create_task(self._answer(request, around, waiting))
                del request
                tasks.add(task)
                task.add_done_callback(ended)
            if tasks:
                await asyncio.wait(tasks)
            await waiting.put(None)
        except Exception as error:  # noqa: BLE001 - raised by whoever reads the replies
            await waiting.put(error)
        finally:
            left = list(tasks)
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left)

    async def _answer(self, request: Any, around: Surroundings, waiting: asyncio.Queue[_Item]) -> None:
        """Answers one request; its record is one of a call's, as if it had come alone."""
        record = AccessRecord(
            rpc=around.rpc,
            peer=around.peer,
            caller=current_record().caller,
            trace=self._tracer.request(around.rpc, around.metadata),
            is_streamed=True,
        )
        open_record(record)
        request_id = request.id
        try:
            with self._turnstile.request(current_caller().name):
                replies = self._told(request, around, record)
                del request  # Pictures are large; what is left of them is in the jobs.
                async with contextlib.aclosing(replies):
                    async for reply in replies:
                        await waiting.put(reply)
        except asyncio.CancelledError:
            record.code = "CANCELLED"
            raise
        except Exception as error:  # noqa: BLE001 - every error is told
            status = status_for(error, record)
            await waiting.put(error if around.ends_on_error else _error(request_id, status, is_final=True))
        finally:
            record.close(self._metrics)

    async def _told(self, request: Any, around: Surroundings, record: AccessRecord) -> AsyncGenerator[Any, None]:
        """The replies of one request."""
        terms = read_terms(request)
        record.request_id = terms.request_id
        request_id, left = request.id, 1
        steps = self._inference.steps(request, terms, record, around.deadline, always_predicts=True)
        async with contextlib.aclosing(steps):
            del request
            predicted: Predicted | None = None
            async for step in steps:
                left -= 1
                match step:
                    case Predicted():
                        predicted, left = step, len(step.asked.heatmaps)
                        outputs: Iterable[Output] = step.outputs
                    case Explained():
                        outputs = (step.output,)
                    case Failed() if around.ends_on_error:
                        raise step.error
                    case Failed():
                        status = status_for(step.error, AccessRecord(rpc=record.rpc, peer=record.peer))
                        yield _error(request_id, status, step.name, is_final=not left and not terms.wants_empty_final)
                        continue
                yield _reply(predicted, request_id, outputs, is_final=not left and not terms.wants_empty_final)
            if terms.wants_empty_final:
                yield _reply(predicted, request_id, (), is_final=True)


def _reply(predicted: Predicted | None, request_id: str, outputs: Iterable[Output], *, is_final: bool) -> Any:
    message = ModelStreamInferResponse()
    response = message.infer_response
    response.id = request_id
    if predicted is not None:
        response.model_name, response.model_version = predicted.model.card.name, predicted.model.card.version
    _put(response, {"triton_final_response": is_final})
    for output in outputs:
        put_output(response, output)
    return message


def _error(request_id: str, status: status_pb2.Status, output: str = "", *, is_final: bool) -> Any:
    """An error in band: its text, and what a status would carry as parameters."""
    message = ModelStreamInferResponse(error_message=status.message)
    message.infer_response.id = request_id
    facts: dict[str, Value] = {"triton_final_response": is_final, "error_code": status.code}
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            facts["error_reason"] = info.reason
        elif detail.Unpack(retry):
            facts["retry_after_seconds"] = retry.retry_delay.ToNanoseconds() / 1e9
    if output:
        facts["output"] = output
    _put(message.infer_response, facts)
    return message


def _put(response: Any, facts: dict[str, Value]) -> None:
    for name, value in facts.items():
        response.parameters[name].CopyFrom(parameter(value))

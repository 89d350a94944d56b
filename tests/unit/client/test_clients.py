from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator

import grpc
import numpy as np
import pytest

import camserve.client
from camserve.client import (
    AsyncClient,
    CamserveError,
    Cancelled,
    Client,
    DeadlineExceeded,
    Heatmap,
    Internal,
    InvalidInput,
    InvalidRequest,
    NotFound,
    Prediction,
    Result,
    Spec,
    SpecError,
    Summary,
    TopK,
)
from camserve.v1 import explanation_service_pb2
from tests.unit.client.conftest import Peer, heatmap, prediction, summary, when_left

Responses = Iterator[explanation_service_pb2.ExplainResponse]


def _until_left(peer: Peer) -> None:
    """Lets the peer send its prediction and then wait until the caller is gone."""

    def answer(request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext) -> Responses:
        when_left(context, peer.cancelled)
        yield prediction()
        peer.cancelled.wait(120)

    peer.answer = answer


def test_the_public_names_are_these() -> None:
    """Adding or dropping one is a decision."""
    expected = """
        Above AsyncClient Box CamserveError Cancelled ClassScore Client CorruptPayload Credentials DeadlineExceeded
        Denied Detection DetectionBox Difference Embedding Event ExtraInputInfo FailedPrecondition FieldViolation
        Geometry HeatRegion Heatmap InputInfo Internal InvalidInput InvalidRequest Kth LayerInfo MethodInfo ModelCard
        ModelPlan ModelStatus NotFound Overloaded PermissionDenied Phrase Prediction Region ResolvedTarget Result
        RuleInfo Similar Spec SpecError Steps Summary TensorInput Timings TopK Unauthenticated Unavailable
        Unimplemented
    """.split()  # noqa: SIM905  # Fifty quoted names are harder to read.

    assert expected == camserve.client.__all__
    assert all(hasattr(camserve.client, name) for name in expected)


def test_a_result_holds_everything_that_arrived(client: Client, png: bytes) -> None:
    """Prediction, maps in order of their specs, the spec that failed, and the summary."""
    result = client.explain(
        png,
        model="surface",
        specs=["grad-cam", Spec("cam", layers=["flat"]), Spec("layercam", target=TopK(2))],
        request_id="mine",
    )

    assert ("scratch", 1, 0.75) == (
        result.prediction.label,
        result.prediction.class_index,
        result.prediction.probability,
    )
    assert [(0, 0), (2, 0), (2, 1)] == [(item.spec_index, item.target_index) for item in result.heatmaps]
    assert ["grad-cam", "layercam", "layercam"] == [item.method for item in result.heatmaps]
    assert [(1, "LAYER_UNUSABLE")] == [(item.spec_index, item.error.reason) for item in result.errors]
    assert ("mine", 0.012, 3) == (result.summary.request_id, result.summary.timings.forward, result.summary.batch_rows)
    with pytest.raises(CamserveError, match="LAYER_UNUSABLE"):
        result.raise_for_errors()


def test_maps_are_put_in_order_whatever_order_they_come_in(peer: Peer, client: Client, png: bytes) -> None:
    """The server sends what is ready first."""

    def answer(request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext) -> Responses:
        yield prediction()
        yield heatmap(spec_index=1)
        yield heatmap(spec_index=0)
        yield summary(request)

    peer.answer = answer

    assert [0, 1] == [item.spec_index for item in client.explain(png, model="surface", specs=["cam", "cam"]).heatmaps]


def test_options_reach_the_request(peer: Peer, client: Client, png: bytes) -> None:
    """Nothing that was asked for is dropped."""
    client.explain(
        png, model="surface", version="2", top_k=3, labels={"line": "7"}, lane="bulk",
        region_of_interest=camserve.client.Box(1, 2, 3, 4),
        extra_inputs={"angle": camserve.client.TensorInput(np.ones(1, np.float32))},
    )  # fmt: skip

    sent = peer.requests[0]
    assert ("surface", "2", 3, {"line": "7"}) == (sent.model, sent.version, sent.top_k, dict(sent.labels))
    assert explanation_service_pb2.LANE_BULK == sent.lane
    assert (1, 2, 3, 4) == tuple(value for _, value in sent.region_of_interest.ListFields())
    assert b"\x00\x00\x80\x3f" == sent.extra_inputs["angle"].data
    assert not sent.HasField("request_id")
    assert not sent.HasField("deadline")


def test_options_that_do_not_exist_are_refused(client: Client, png: bytes) -> None:
    """A typing error must not become a silent default."""
    with pytest.raises(TypeError, match="no option 'topk'; there are deadline"):
        client.explain(png, model="surface", topk=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="timeout is 0"):
        client.explain(png, model="surface", timeout=0)


def test_events_arrive_in_the_order_of_the_stream(client: Client, png: bytes) -> None:
    """The prediction comes before any map."""
    events = client.stream(png, model="surface", specs=["grad-cam", Spec("cam", layers=["flat"])])

    assert [Prediction, Heatmap, SpecError, Summary] == [type(event) for event in events]


async def test_the_async_client_gives_the_same(async_client: AsyncClient, png: bytes) -> None:
    """Siblings, method for method."""
    async with async_client as client:
        result = await client.explain(png, model="surface", specs=["grad-cam"])
        kinds = [type(event) async for event in client.stream(png, model="surface", specs=["grad-cam"])]
        card, models = await client.model("surface"), await client.models()

    assert ("scratch", 1) == (result.prediction.label, len(result.heatmaps))
    assert [Prediction, Heatmap, Summary] == kinds
    assert ("surface", 2) == (card.name, len(models))


def test_leaving_the_loop_early_cancels_the_call_on_the_server(peer: Peer, client: Client, png: bytes) -> None:
    """Whoever wants only the prediction stops the rest of the work."""
    _until_left(peer)

    for event in client.stream(png, model="surface", specs=["grad-cam"]):
        assert isinstance(event, Prediction)
        break

    assert peer.cancelled.wait(120)


async def test_leaving_the_async_loop_early_cancels_the_call_on_the_server(
    peer: Peer, async_client: AsyncClient, png: bytes
) -> None:
    """Inside `aclosing` at once."""
    _until_left(peer)

    async with async_client as client:
        async with contextlib.aclosing(client.stream(png, model="surface", specs=["grad-cam"])) as events:
            async for event in events:
                assert isinstance(event, Prediction)
                break
        assert await asyncio.to_thread(peer.cancelled.wait, 120)


async def test_cancelling_the_task_cancels_the_call_on_the_server(
    peer: Peer, async_client: AsyncClient, png: bytes
) -> None:
    """A web handler whose own caller left takes the explanation with it."""
    _until_left(peer)
    has_begun = asyncio.Event()

    async def read() -> None:
        async for _ in async_client.stream(png, model="surface"):
            has_begun.set()

    async with async_client:
        task = asyncio.create_task(read())
        await has_begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(peer.cancelled.wait, 120)


def test_closing_the_client_ends_calls_under_way(peer: Peer, png: bytes) -> None:
    """They end as `Cancelled`, with the reason."""
    _until_left(peer)
    client = Client(peer.target)
    events = client.stream(png, model="surface")
    next(events)

    client.close()

    with pytest.raises(Cancelled, match="CLIENT_CLOSED"):
        next(events)
    with pytest.raises(Cancelled, match="CLIENT_CLOSED"):
        client.models()


async def test_closing_the_async_client_ends_calls_under_way(peer: Peer, async_client: AsyncClient, png: bytes) -> None:
    """They end as `Cancelled`, never as a CancelledError that nobody asked for."""
    _until_left(peer)
    events = async_client.stream(png, model="surface")
    await anext(events)

    await async_client.close()

    with pytest.raises(Cancelled, match="CLIENT_CLOSED"):
        await anext(events)
    with pytest.raises(Cancelled, match="CLIENT_CLOSED"):
        await async_client.models()


def test_the_timeout_ends_a_call_that_hangs(peer: Peer, client: Client, png: bytes) -> None:
    """A server that says nothing does not hold its caller."""
    _until_left(peer)

    with pytest.raises(DeadlineExceeded):
        client.explain(png, model="surface", timeout=0.5)

    # On a busy machine the time may be over before the call is under way.
    assert peer.requests == [] or peer.cancelled.wait(120)


def test_a_stream_cut_off_without_an_error_is_no_result(peer: Peer, client: Client, png: bytes) -> None:
    """Without its summary an explanation is not complete."""
    peer.answer = lambda request, context: iter([prediction()])

    with pytest.raises(Internal, match="STREAM_INCOMPLETE"):
        client.explain(png, model="surface")


def _numbered(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((1, number + 1), 0, np.uint8)


class _Rendezvous:
    """Holds the peer's answers until as many are under way as a test expects, so that more would show."""

    def __init__(self, peer: Peer, parties: int) -> None:
        self._barrier = threading.Barrier(parties)
        self._full_answer = peer.full_answer
        peer.answer = self

    def __call__(self, request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext) -> Responses:
        self._barrier.wait(120)
        yield from self._full_answer(request, context)


def test_many_results_come_in_order_with_no_more_than_asked_under_way(peer: Peer, client: Client) -> None:
    """Three at a time, though twelve could be; each source is that of its own picture."""
    _Rendezvous(peer, 3)

    results = list(client.explain_many(map(_numbered, range(12)), model="surface", specs=["cam"], concurrency=3))

    assert list(range(1, 13)) == [result.heatmaps[0].geometry.source_width for result in results]  # type: ignore[union-attr]
    assert 3 == peer.most_at_once


async def test_many_async_results_come_in_order_with_no_more_than_asked_under_way(
    peer: Peer, async_client: AsyncClient
) -> None:
    """The images may come from an async iterable."""
    _Rendezvous(peer, 3)

    async def images() -> AsyncIterator[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        for number in range(12):
            yield _numbered(number)

    async with async_client as client:
        results = [r async for r in client.explain_many(images(), model="surface", specs=["cam"], concurrency=3)]

    assert list(range(1, 13)) == [result.heatmaps[0].geometry.source_width for result in results]  # type: ignore[union-attr]
    assert 3 == peer.most_at_once


def test_images_are_taken_only_as_room_comes_free(client: Client) -> None:
    """An endless source is fine: no more than two for each request under way are held."""
    taken: list[int] = []

    def endless() -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        number = 0
        while True:
            taken.append(number)
            yield _numbered(0)
            number += 1

    results = client.explain_many(endless(), model="surface", concurrency=2)
    for _ in range(3):
        next(results)
    results.close()

    assert len(taken) <= 3 + 4


def test_leaving_many_early_cancels_what_is_under_way(peer: Peer, client: Client, png: bytes) -> None:
    """The rest of the work stops."""
    first_is_done = threading.Event()
    full_answer = peer.full_answer

    def answer(request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext) -> Responses:
        if first_is_done.is_set():
            when_left(context, peer.cancelled)
            yield prediction()
            peer.cancelled.wait(120)
        else:
            first_is_done.set()
            yield from full_answer(request, context)

    peer.answer = answer
    results = client.explain_many([png] * 4, model="surface", concurrency=1)
    next(results)
    results.close()

    assert peer.requests[1:] == [] or peer.cancelled.wait(120)
    assert "scratch" == client.model("surface").labels[1]  # The client itself goes on.


def test_a_failed_image_is_returned_in_its_place_or_raised(client: Client, png: bytes) -> None:
    """One bad file need not stop the others."""
    images: list[str | bytes] = [png, b"no image", "/nowhere.png", png]

    returned = list(client.explain_many(images, model="surface", on_error="return"))

    assert [Result, InvalidRequest, InvalidInput, Result] == [type(item) for item in returned]
    with pytest.raises(InvalidRequest, match="IMAGE_UNDECODABLE"):
        list(client.explain_many(images, model="surface"))


def test_many_images_cannot_share_a_request_id(client: Client, png: bytes) -> None:
    """A repeated id means the same request."""
    with pytest.raises(TypeError, match="request_id"):
        client.explain_many([png], model="surface", request_id="one")  # type: ignore[call-overload]


def test_cards_hold_what_the_server_says(client: Client) -> None:
    """Layers with their refusals, methods with their notes, digests and times."""
    card = client.model("surface")

    assert ("good", "scratch") == card.labels
    assert [("layer2", (2, 2), ""), ("flat", (), "no spatial extent")] == [
        (layer.name, layer.map_shape, layer.refusal) for layer in card.layers
    ]
    assert [("grad-cam", True), ("cam", False)] == [(method.method, method.works) for method in card.methods]
    assert ("torchscript", 1.5, None) == (card.kind, card.warm_up_seconds, card.static_batch_rows)
    assert ("classification", ("layer1", "layer2"), ("a scratch",)) == (card.output_kind, card.stages, card.phrases)
    assert ("folded, channels last", 1.5, 2, 4) == (
        card.plan.form,
        card.plan.speedup,
        card.plan.threads,
        card.plan.chunk_rows,
    )
    assert [("mask", (1, 4), "float32")] == [(extra.name, extra.shape, extra.dtype) for extra in card.extra_inputs]
    assert ["failed", "ready"] == [status.state for status in client.models()]
    with pytest.raises(NotFound, match="there are surface"):
        client.model("other")

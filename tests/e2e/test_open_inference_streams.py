"""ModelStreamInfer through a real server and channel: order of replies, errors in band, callers who leave or do not read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, Self

import grpc
import numpy as np
import pytest
from support import oip
from support.gated import GATE, gated_source
from support.nets import TinyNet
from support.servers import Metrics, script_source, until

from camserve.server.oip.streams import MOST_OPEN_REQUESTS

ROW = np.random.default_rng(2).standard_normal((1, 3, 32, 32), np.float32)
EMPTY_FINAL = {"triton_enable_empty_final_response": True}


class Conversation:
    """A stream that a test talks to: `say` a request, read replies one by one, and hang up."""

    def __init__(self, target: str, **options: Any) -> None:
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(target, [("grpc.max_receive_message_length", -1)])
        self.call = oip.Stub(self._channel).ModelStreamInfer(iter(self._said.get, None), **options)

    def say(self, *requests: Any) -> Self:
        """Sends requests."""
        for request in requests:
            self._said.put(request)
        return self

    def done(self) -> Self:
        """Says that no more comes."""
        self._said.put(None)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self.call)

    def __next__(self) -> Any:
        return next(self.call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._said.put(None)
        self.call.cancel()
        self._channel.close()


@pytest.fixture
def tiny(serve, tmp_path):
    """A server with a small model."""
    return serve(script_source("tiny", TinyNet(), tmp_path))


@pytest.fixture
def gated(serve, tmp_path):
    """A server whose model `gated` makes no map before the gate opens, and `tiny`, which is not held up."""
    GATE.opened.set()
    server = serve(gated_source(), script_source("tiny", TinyNet(), tmp_path))
    GATE.reset()
    yield server
    GATE.opened.set()


def told(reply: Any) -> tuple[str, list[str], bool]:
    """Whose reply it is, its outputs, and whether it is the last."""
    answer = reply.infer_response
    return answer.id, [output.name for output in answer.outputs], oip.plain(answer.parameters)["triton_final_response"]


HEATMAPS = {"heatmap:0": {}, "heatmap:1": {"method": "layercam"}}


def test_the_prediction_comes_first_and_the_last_reply_says_so(tiny):
    """One reply with the model's own outputs, then one for each heatmap; only the last is final; maps are those of ModelInfer."""
    asked = oip.request("tiny", {"input": ROW}, ["logits", *HEATMAPS], id="a")
    with Conversation(tiny.target) as stream, grpc.insecure_channel(tiny.target) as channel:
        replies = list(stream.say(asked).done())
        whole = oip.arrays(oip.Stub(channel).ModelInfer(asked))

    first, *maps = map(told, replies)
    assert ("a", ["logits"], False) == first
    assert sorted(HEATMAPS) == sorted(name for _, (name,), _ in maps)
    assert [False, True] == [is_final for _, _, is_final in maps]
    found = {name: values for reply in replies for name, values in oip.arrays(reply.infer_response).items()}
    assert {name: values.tobytes() for name, values in whole.items()} == {
        name: values.tobytes() for name, values in found.items()
    }
    assert not any(reply.error_message for reply in replies)


def test_a_prediction_alone_is_final(tiny):
    """A request without outputs gets one reply, which is the last."""
    with Conversation(tiny.target) as stream:
        (reply,) = stream.say(oip.request("tiny", {"input": ROW}, id="x")).done()

    assert ("x", ["logits", "probabilities"], True) == told(reply)


def test_heatmaps_alone_come_behind_the_prediction(gated):
    """The prediction is there before a gradient, and so before a map, can be."""
    with Conversation(gated.target) as stream:
        first = told(next(stream.say(oip.request("gated", {"input": ROW}, ["heatmap"], id="x"))))
        assert ("x", ["logits", "probabilities"], False) == first
        assert 0 == GATE.rows_backward
        GATE.opened.set()
        assert ("x", ["heatmap"], True) == told(next(stream))


def test_requests_are_answered_as_they_finish(gated):
    """Who came second and is done first is answered first; ids tell whose reply it is."""
    held = oip.request("gated", {"input": ROW}, ["heatmap"], id="held")
    quick = oip.request("tiny", {"input": ROW}, id="quick")
    with Conversation(gated.target) as stream:
        assert "held" == told(next(stream.say(held)))[0]
        # The device is held by the first; a request that is refused needs none.
        bad = oip.request("tiny", {"input": ROW[:, :2]}, id="bad")
        refused = next(stream.say(bad))
        assert "bad" == refused.infer_response.id
        GATE.opened.set()
        left = [told(reply) for reply in stream.say(quick).done()]

    assert {("held", True), ("quick", True)} == {(name, is_final) for name, _, is_final in left}


def test_a_batch_is_one_request(tiny):
    """Its prediction comes when all rows have one, and each heatmap when all rows have it."""
    asked = oip.request("tiny", {"input": np.repeat(ROW, 3, axis=0)}, HEATMAPS, id="b")
    with Conversation(tiny.target) as stream:
        replies = [reply.infer_response for reply in stream.say(asked).done()]

    assert [(3, 4), (3, 4)] == [values.shape for values in oip.arrays(replies[0]).values()]
    assert [(3, 8, 8)] * 2 == [values.shape for reply in replies[1:] for values in oip.arrays(reply).values()]


def test_errors_come_in_band(tiny):
    """A wrong request is told by id with reason and code, and the stream answers the next one."""
    wrong = [
        oip.request("nobody", {"input": ROW}, id="model"),
        oip.request("tiny", {"input": ROW[:, :2]}, id="shape"),
        oip.request("tiny", {"input": ROW}, {"heatmap": {"method": "cams"}}, id="method"),
        oip.request("tiny", {"input": ROW}, parameters={"triton_bar": 1}, id="parameter"),
    ]
    with Conversation(tiny.target) as stream:
        errors = {}
        for request in wrong:
            reply = next(stream.say(request))
            assert request.id == reply.infer_response.id
            errors[request.id] = (reply.error_message, oip.plain(reply.infer_response.parameters))
        assert ("fine", True) == (told(next(stream.say(oip.request("tiny", {"input": ROW}, id="fine"))))[::2])

    assert "known models: tiny" in errors["model"][0]
    codes = {name: (facts["error_code"], facts["error_reason"]) for name, (_, facts) in errors.items()}
    assert {
        "model": (5, "MODEL_NOT_FOUND"),
        "shape": (3, "TENSOR_MISMATCH"),
        "method": (3, "FIELD_INVALID"),
        "parameter": (3, "FIELD_INVALID"),
    } == codes
    assert all(facts["triton_final_response"] for _, facts in errors.values())


def test_a_heatmap_that_fails_leaves_the_others(tiny):
    """It is told by name, and the rest of the request comes."""
    asked = {"heatmap:0": {"target": '{"above": {"probability": 1}}'}, "heatmap:1": {}}
    with Conversation(tiny.target) as stream:
        first, *rest = stream.say(oip.request("tiny", {"input": ROW}, asked, id="x")).done()

    assert ["logits", "probabilities"] == told(first)[1]
    (failed,) = [reply for reply in rest if reply.error_message]
    assert "heatmap:0" == oip.plain(failed.infer_response.parameters)["output"]
    assert ["heatmap:1"] == [name for reply in rest for name in told(reply)[1]]
    assert [False, True] == [told(reply)[2] for reply in rest]


def test_errors_end_the_stream_where_that_is_asked_for(tiny):
    """With `triton_grpc_error` in its metadata the first error is the call's status."""
    with Conversation(tiny.target, metadata=(("triton_grpc_error", "true"),)) as stream:
        assert told(next(stream.say(oip.request("tiny", {"input": ROW}, id="fine"))))
        with pytest.raises(grpc.RpcError) as caught:
            next(stream.say(oip.request("nobody", {"input": ROW}, id="wrong")))

    assert grpc.StatusCode.NOT_FOUND is caught.value.code()
    assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata())


def test_an_empty_final_reply_comes_when_asked_for(tiny):
    """It has no outputs and is the only final one."""
    asked = oip.request("tiny", {"input": ROW}, ["logits", "heatmap"], id="x", parameters=EMPTY_FINAL)
    with Conversation(tiny.target) as stream:
        replies = [told(reply) for reply in stream.say(asked).done()]

    assert [("x", ["logits"], False), ("x", ["heatmap"], False), ("x", [], True)] == replies


async def test_a_caller_who_leaves_frees_its_places(gated):
    """A cancelled stream takes its requests out of the server, while the device is still at them."""
    metrics = Metrics(gated)
    with Conversation(gated.target) as stream:
        stream.say(*(oip.request("gated", {"input": ROW}, ["heatmap"], id=str(place)) for place in range(5)))
        assert told(next(stream))
        await until(lambda: metrics.value("camserve_requests_in_flight") == 5)
        stream.call.cancel()
        await until(lambda: metrics.value("camserve_requests_in_flight") == 0)
        assert not GATE.opened.is_set()


async def test_a_call_that_is_cancelled_frees_its_places(gated):
    """Every row of a ModelInfer leaves with its caller."""
    metrics = Metrics(gated)
    with grpc.insecure_channel(gated.target) as channel:
        rows = np.repeat(ROW, 3, axis=0)
        call = oip.Stub(channel).ModelInfer.future(oip.request("gated", {"input": rows}, ["heatmap"]))
        await until(lambda: metrics.value("camserve_requests_in_flight") == 3)
        call.cancel()
        await until(lambda: metrics.value("camserve_requests_in_flight") == 0)
        assert not GATE.opened.is_set()


async def test_a_stream_has_so_many_requests_under_way_and_no_more(gated):
    """What comes beyond that is not read until others are answered."""
    metrics, count = Metrics(gated), 2 * MOST_OPEN_REQUESTS
    with Conversation(gated.target) as stream:
        stream.say(*(oip.request("gated", {"input": ROW}, ["heatmap"], id=str(place)) for place in range(count)))
        await until(lambda: metrics.value("camserve_requests_in_flight") == MOST_OPEN_REQUESTS)
        seen = []
        reading = threading.Thread(target=lambda: seen.extend(map(told, stream.done())))
        reading.start()
        GATE.opened.set()
        reading.join(120)

    assert count == sum(is_final for _, _, is_final in seen)
    assert 0 == metrics.value("camserve_requests_in_flight")


async def test_a_reader_that_stops_loses_its_places(serve, tmp_path):
    """Replies that nobody takes are held back by flow control; after `write_seconds` the stream ends and its places are free."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), write_seconds=1)
    metrics = Metrics(server)
    picture = np.zeros((2000, 2000, 3), np.uint8)
    asked = {f"heatmap:{place}": {"size": "source"} for place in range(4)}
    with Conversation(server.target) as stream:
        stream.say(*(oip.request("tiny", {"image": picture}, asked, id=str(place)) for place in range(3)))
        await until(lambda: metrics.value("camserve_requests_in_flight") > 0)
        await until(lambda: metrics.value("camserve_requests_in_flight") == 0)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)

    assert grpc.StatusCode.DEADLINE_EXCEEDED is caught.value.code()
    assert "it was not read" in caught.value.details()


async def test_a_server_that_ends_answers_what_it_took(gated):
    """While it drains, what is under way on a stream is finished, and what comes anew refused in band; then the stream ends."""
    metrics = Metrics(gated)
    with Conversation(gated.target) as stream:
        first = told(next(stream.say(oip.request("gated", {"input": ROW}, ["heatmap"], id="taken"))))
        assert ("taken", False) == first[::2]
        draining = gated.run(gated.app.drain())
        await until(lambda: metrics.value("camserve_draining") == 1)
        late = oip.request("gated", {"input": ROW[:, :2]}, id="late")
        facts: dict[str, Any] = {"error_reason": ""}
        while facts["error_reason"] != "DRAINING":
            # Until the door is closed, a moment later, it is refused for its shape.
            facts = oip.plain(next(stream.say(late)).infer_response.parameters)
        assert (14, True) == (facts["error_code"], facts["triton_final_response"])
        GATE.opened.set()
        assert ("taken", ["heatmap"], True) == told(next(stream))
        with pytest.raises(grpc.RpcError):
            next(stream)
        assert draining.result(60)


def test_streamed_requests_are_counted_one_by_one(tiny):
    """Each is a request to the metrics, with its own outcome."""
    metrics = Metrics(tiny)
    with Conversation(tiny.target) as stream:
        requests = [oip.request("tiny", {"input": ROW}, id=str(place)) for place in range(3)]
        assert 4 == len(list(stream.say(*requests, oip.request("tiny", {}, id="wrong")).done()))

    assert 3 == metrics.value("camserve_requests_total", model="tiny", code="OK")
    assert 1 == metrics.value("camserve_requests_total", model="tiny", code="INVALID_ARGUMENT")


def test_what_is_no_request_ends_the_stream(tiny):
    """Bytes that cannot be read belong to no id."""
    with grpc.insecure_channel(tiny.target) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([b"\xff\xff"]))
        with pytest.raises(grpc.RpcError) as caught:
            next(call)

    assert grpc.StatusCode.INVALID_ARGUMENT is caught.value.code()

"""The Open Inference Protocol and models that do not classify, or take several inputs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from PIL import Image
from support import oip
from support.kinds import sources_of_kinds
from support.nets import TinyNet
from support.servers import script_source, settings

from camserve.client import Box, Client, Region, Spec, Steps, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.models.config import OutputConfig


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Iterator[BackgroundServer]:
    """A server with one model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    values = script_source("regression", TinyNet(), folder, output=OutputConfig(kind="regression"))
    with BackgroundServer(settings(), [*sources_of_kinds(folder), values]) as server:
        yield server


@pytest.fixture
def stub(kinds) -> Iterator[oip.Stub]:
    """Its calls."""
    with grpc.insecure_channel(kinds.target) as channel:
        yield oip.Stub(channel)


@pytest.fixture
def own(kinds) -> Iterator[Client]:
    """Our own client."""
    with Client(kinds.target) as client:
        yield client


@pytest.fixture
def picture() -> bytes:
    """A PNG 64 wide and 32 high; the left half is brighter."""
    pixels = np.full((32, 64, 3), 80, np.uint8)
    pixels[:, :32] = 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


OUTPUTS = {
    "segmentation": {"logits": [-1, 2], "probabilities": [-1, 2]},
    "embedding": {"embedding": [-1, -1]},
    "sequence": {"logits": [-1, -1, 4], "probabilities": [-1, -1, 4]},
    "detection": {"boxes": [-1, -1, 4], "scores": [-1, -1], "classes": [-1, -1]},
    "regression": {"values": [-1, 4]},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_is_advertised_comes(stub, picture, kind):
    """Names, types and shapes of metadata are those of the answer, for one row and for two."""
    told = stub.ModelMetadata(oip.message("ModelMetadataRequest", name=kind)).outputs
    assert OUTPUTS[kind] == {entry.name: list(entry.shape) for entry in told if entry.name != "heatmap"}
    for rows in (1, 2):
        response = stub.ModelInfer(oip.request(kind, {"image": [picture] * rows}))
        sent = {entry.name: entry for entry in response.outputs}
        assert list(OUTPUTS[kind]) == list(sent)
        for entry in told:
            if entry.name == "heatmap":
                continue
            assert entry.datatype == sent[entry.name].datatype
            shape = list(sent[entry.name].shape)
            assert rows == shape[0]
            assert len(entry.shape) == len(shape)
            assert all(size in (-1, found) for size, found in zip(entry.shape, shape, strict=True))


def test_detections_are_on_the_source(stub, own, picture):
    """Boxes, scores and classes are those that our own client is told."""
    found = oip.arrays(stub.ModelInfer(oip.request("detection", {"image": [picture]})))

    ours = own.explain(picture, model="detection").prediction.detections
    assert [entry.class_index for entry in ours] == found["classes"][0].tolist()
    assert [np.float32(entry.score) for entry in ours] == found["scores"][0].tolist()
    left, _, width, _ = found["boxes"][0, 0]
    assert ours[0].box.left == pytest.approx(left, abs=1)
    assert ours[0].box.width == pytest.approx(width, abs=1)


def test_an_embedding_is_a_vector(stub, own, picture):
    """All of its dimensions."""
    found = oip.arrays(stub.ModelInfer(oip.request("embedding", {"image": [picture]})))["embedding"][0]

    assert np.array_equal(np.float32(own.explain(picture, model="embedding").prediction.embedding), found)


def test_a_region_is_asked_about_as_json(stub, own, picture):
    """Targets in places on the source go as tables in the words of the contract."""
    target = {"region": {"box": {"left_pixels": 8, "top_pixels": 8, "width_pixels": 8, "height_pixels": 8}}}
    asked = {"heatmap": {"method": "vanilla-backprop", "saliency": "gray", "target": json.dumps(target)}}
    found = oip.arrays(stub.ModelInfer(oip.request("segmentation", {"image": [picture]}, asked)))["heatmap"]

    spec = Spec("vanilla-backprop", saliency="gray", target=Region(box=Box(8, 8, 8, 8)), encoding="float32")
    assert own.explain(picture, model="segmentation", specs=[spec]).heatmaps[0].values.tobytes() == found[0].tobytes()


def test_steps_are_an_axis(stub, own, picture):
    """One map for each step, behind the batch."""
    asked = {"heatmap": {"target": json.dumps({"steps": {"first": 2, "count": 3}})}}
    response = stub.ModelInfer(oip.request("sequence", {"image": [picture, picture]}, asked))

    found = oip.arrays(response)["heatmap"]
    assert (2, 3) == found.shape[:2]
    assert [2, 3, 4] * 2 == json.loads(oip.facts(response, "heatmap")["step"])
    ours = own.explain(
        picture, model="sequence", specs=[Spec("grad-cam", target=Steps(first=2, count=3), encoding="float32")]
    )
    for expected, values in zip(ours.heatmaps, found[0], strict=True):
        np.testing.assert_allclose(expected.values, values, rtol=1e-4, atol=1e-6)


def test_further_inputs_go_by_name(stub, own):
    """Each row has its own; a batch has as many of each."""
    rows = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    masks = np.random.default_rng(1).random((2, 1, 16, 16), np.float32)
    both = oip.arrays(stub.ModelInfer(oip.request("gated", {"input": rows, "mask": masks}, ["logits"])))["logits"]
    for place in range(2):
        one = own.explain(
            TensorInput(rows[place]), model="gated", top_k=6, extra_inputs={"mask": TensorInput(masks[place])}
        )
        expected = [entry.logit for entry in sorted(one.prediction.classes, key=lambda entry: entry.class_index)]
        np.testing.assert_allclose(expected, both[place], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input": (2, 3, 32, 32)}, "which takes mask"),
        ({"input": (2, 3, 32, 32), "mask": (3, 1, 16, 16)}, "has 3 rows, the main input 2"),
        ({"input": (2, 3, 32, 32), "mask": (2, 1, 8, 16)}, "inputs[mask]"),
        ({"input": (2, 3, 32, 32), "mask": (16, 16)}, "has 2 axes"),
        ({"mask": (1, 16, 16)}, "input or image"),
    ],
)
def test_further_inputs_that_do_not_fit(stub, inputs, said):
    """They are named as the caller wrote them."""
    asked = oip.request("gated", {name: np.zeros(shape, "float32") for name, shape in inputs.items()})
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(asked)

    assert grpc.StatusCode.INVALID_ARGUMENT is caught.value.code()
    assert said in caught.value.details()

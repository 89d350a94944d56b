"""Clients that people already have, against a real server: each in a process and an environment of its own, from `make clients`.

Each asks all its questions in one run of its script in tests/clients; the tests here look at what it was answered, beside what
our own client is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.folders import put_version
from support.servers import settings
from support.standard_clients import ROOT, ask

from camserve.client import Client, Heatmap, Result, Spec, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.models.sources import scan_repository

DEMO = ROOT / "server" / "camserve" / "server" / "demo"
IMAGE = DEMO / "samples" / "scratch-twill.jpg"


def row() -> npt.NDArray[np.float32]:
    """One input of the demo model, with the batch in front, as other servers' clients send it."""
    return np.random.default_rng(7).normal(size=(1, 3, 160, 160)).astype(np.float32)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a repository with the demo model, and with one that may come and go."""
    repository = tmp_path_factory.mktemp("models")
    shutil.copytree(DEMO / "models" / "surface", repository / "surface")
    put_version(repository, "spare", 1, best=1)
    with BackgroundServer(settings(repository=repository), list(scan_repository(repository))) as server:
        yield server.target


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The row as a file."""
    path = tmp_path_factory.mktemp("row") / "row.npy"
    np.save(path, row())
    return path


@pytest.fixture(scope="module")
def ours(target: str) -> Mapping[str, Result]:
    """What our client is answered."""
    layercam = Spec("layercam", layers=["layer2"], target="scratch", encoding="float32")
    exact = Spec("grad-cam", encoding="float32")
    with Client(target) as client:
        return {
            "predicted": client.explain(TensorInput(row()[0]), model="surface", specs=[], top_k=5),
            "one": client.explain(TensorInput(row()[0]), model="surface", specs=[Spec("layercam", encoding="float32")]),
            "several": client.explain(TensorInput(row()[0]), model="surface", specs=[exact, layercam]),
            "defaults": client.explain(TensorInput(row()[0]), model="surface", specs=[layercam]),
            "image": client.explain(IMAGE, model="surface", specs=[exact]),
        }


@pytest.fixture(scope="module")
def triton(target: str, tensor: Path, ours: Mapping[str, Result]) -> Mapping[str, Any]:
    """What tritonclient was answered: by its blocking client and by that for asyncio."""
    return ask("tritonclient", "calls.py", target, IMAGE, tensor)


@pytest.fixture(scope="module")
def kserve(target: str, tensor: Path, ours: Mapping[str, Result]) -> Mapping[str, Any]:
    """What KServe's client was answered."""
    return ask("kserve", "calls.py", target, IMAGE, tensor)


@pytest.fixture(scope="module")
def node(target: str, tensor: Path, ours: Mapping[str, Result]) -> Mapping[str, Any]:
    """What Node was answered."""
    return ask("node", "calls.js", target, IMAGE, tensor, ROOT / "protos" / "inference" / "open_inference.proto")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("blocking", id="triton", marks=pytest.mark.needs_tritonclient),
        pytest.param("awaited", id="triton-aio", marks=pytest.mark.needs_tritonclient),
        pytest.param("kserve", id="kserve", marks=pytest.mark.needs_kserve),
        pytest.param("node", id="node", marks=pytest.mark.needs_node),
    ],
)
def answered(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """What each client was answered, one after another."""
    if request.param in ("kserve", "node"):
        return request.getfixturevalue(request.param)
    return request.getfixturevalue("triton")[request.param]


def values(answer: Mapping[str, Any], output: str) -> npt.NDArray[np.float32]:
    """An output's values: JSON carries every float32 as it is."""
    found = answer["outputs"][output]
    return np.array(found["values"], np.float32).reshape(found["shape"])


def same(heatmap: Heatmap, answer: Mapping[str, Any], output: str) -> bool:
    """Whether an output is our client's map, bit for bit, with the batch in front."""
    return heatmap.values.astype(np.float32)[None].tobytes() == values(answer, output).tobytes()


def test_server_and_model_are_ready(answered):
    """The server lives and is ready, and so is the model."""
    assert (True, True, True) == (answered["live"], answered["ready"], answered["model ready"])


def test_prediction(answered, ours):
    """Without outputs asked for, all that the model says comes back, and nothing is explained; the id comes back as well."""
    answer = answered["predicted"]

    assert {"logits", "probabilities"} == set(answer["outputs"])
    assert ("surface", "1", "part-4711") == (answer["model"], answer["version"], answer["id"])
    expected = [
        found.probability for found in sorted(ours["predicted"].prediction.classes, key=lambda c: c.class_index)
    ]
    assert (1, 5) == values(answer, "probabilities").shape
    assert np.array_equal([expected], values(answer, "probabilities"))


def test_one_heatmap(answered, ours):
    """An output named by a method is that method's map, and nothing else comes."""
    answer = answered["one"]

    assert ["heatmap:layercam"] == list(answer["outputs"])
    assert same(ours["one"].heatmaps[0], answer, "heatmap:layercam")


def test_several_heatmaps(answered, ours):
    """Outputs with parameters of their own are explained each in its way, beside the probabilities."""
    answer = answered["several"]

    assert ["probabilities", "heatmap:0", "heatmap:1"] == list(answer["outputs"])
    assert [True, True] == [same(ours["several"].heatmaps[i], answer, f"heatmap:{i}") for i in (0, 1)]
    told = answer["outputs"]["heatmap:1"]["parameters"]
    assert ("layercam", "layer2", "scratch") == (told["method"], told["layer"], told["label"])


REFUSALS = {
    "model": ("NOT_FOUND", "nobody"),
    "version": ("NOT_FOUND", "7"),
    "output": ("INVALID_ARGUMENT", "no-such-output"),
    "layer": ("NOT_FOUND", "layer9"),
    "parameter": ("INVALID_ARGUMENT", "colour"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_wrong_requests_are_refused(answered, what):
    """What is wrong has a status and a message that names it."""
    status, said = REFUSALS[what]
    refusal = answered["refused"][what]

    assert status == refusal["status"].removeprefix("StatusCode.")
    assert said in refusal["message"]


@pytest.mark.parametrize(
    "client",
    [
        pytest.param("triton", marks=pytest.mark.needs_tritonclient),
        pytest.param("kserve", marks=pytest.mark.needs_kserve),
        pytest.param("node", marks=pytest.mark.needs_node),
    ],
)
class TestWhole:
    """What clients ask once, whichever of their ways they have for it."""

    @pytest.fixture
    def found(self, request: pytest.FixtureRequest, client: str) -> Mapping[str, Any]:
        """What the client was answered."""
        found = request.getfixturevalue(client)
        return found["blocking"] if client == "triton" else found

    def test_server_metadata(self, found):
        """The server says who it is and which extensions it has."""
        assert "camserve" == found["server"]["name"]
        assert {"explain", "parameters", "model_repository"} <= set(found["server"]["extensions"])

    def test_model_metadata(self, found):
        """The model's inputs and outputs have the names and shapes that requests use."""
        metadata = found["metadata"]

        assert ("surface", ["1"]) == (metadata["name"], metadata["versions"])
        assert {"input": ["FP32", [-1, 3, 160, 160]], "image": ["BYTES", [-1, 1]]} == metadata["inputs"]
        assert ["FP32", [-1, 5]] == metadata["outputs"]["probabilities"]
        assert ["FP32", [-1, -1, -1]] == metadata["outputs"]["heatmap"]

    def test_image_file(self, found, ours):
        """A file as it is gives the map that our client gets of it."""
        assert same(ours["image"].heatmaps[0], found["image"], "heatmap")

    def test_defaults(self, found, ours):
        """Parameters of the request are heard by heatmaps that have none."""
        assert same(ours["defaults"].heatmaps[0], found["defaults"], "heatmap")

    def test_unknown_model_is_not_ready(self, found):
        """A model that is not there is not ready, and that is no error."""
        assert found["unknown ready"] is False


@pytest.mark.needs_tritonclient
def test_triton_outputs_without_inputs(triton):
    """A request without inputs says what the model takes."""
    refusal = triton["blocking"]["refused"]["input"]

    assert "StatusCode.INVALID_ARGUMENT" == refusal["status"]
    assert "input or image" in refusal["message"]


@pytest.mark.needs_tritonclient
def test_triton_shared_memory_is_refused(triton):
    """An output wanted in shared memory is refused rather than sent otherwise."""
    refusal = triton["blocking"]["refused"]["shared memory"]

    assert "StatusCode.UNIMPLEMENTED" == refusal["status"]
    assert "shared memory" in refusal["message"]


@pytest.mark.needs_tritonclient
def test_triton_callbacks(triton, ours):
    """`async_infer` hands the same answer to its callback."""
    assert same(ours["several"].heatmaps[1], triton["blocking"]["callback"], "heatmap:1")


@pytest.mark.needs_tritonclient
def test_triton_batch(triton, ours):
    """Rows of one request come back in one tensor, explained as each would be alone; classes as Triton's clients read them."""
    answer = triton["blocking"]["batch"]

    best = [found.label for found in ours["predicted"].prediction.classes[:2]]
    assert [3, 2] == answer["outputs"]["probabilities"]["shape"]
    assert 3 * best == [told.split(":")[2] for told in answer["outputs"]["probabilities"]["values"]]
    for name, heatmap in zip(("heatmap:a", "heatmap:b"), ours["several"].heatmaps, strict=True):
        expected = np.stack([heatmap.values] * 3)
        np.testing.assert_allclose(values(answer, name), expected, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.needs_tritonclient
def test_triton_configuration(triton):
    """The configuration names the tensors of the metadata, how many rows a request may have, and what may be left out."""
    config = triton["blocking"]["config"]

    assert ("surface", "camserve", 16) == (config["name"], config["backend"], config["max_batch_size"])
    assert (["input", "image"], ["logits", "probabilities", "heatmap"]) == (config["inputs"], config["outputs"])
    assert ["input", "image"] == config["optional"]


@pytest.mark.needs_tritonclient
def test_triton_repository(triton):
    """A model is unloaded and loaded by the client's own calls; a configuration sent along is refused."""
    found = triton["blocking"]
    ready, gone = {"surface/1": "READY", "spare/1": "READY"}, {"surface/1": "READY", "spare/1": "UNAVAILABLE"}

    assert [ready, gone, ready] == found["repository"]
    assert (False, True) == (found["spare unloaded"], found["spare loaded"])
    assert "StatusCode.UNIMPLEMENTED" == found["refused"]["config"]["status"]


@pytest.mark.needs_kserve
def test_kserve_repository(kserve):
    """KServe's dialect has the model's name in another field, and an answer that is not empty."""
    assert (["spare", True], ["spare", True]) == (kserve["unloaded"], kserve["loaded"])
    assert (False, True) == (kserve["spare unloaded"], kserve["spare loaded"])


@pytest.mark.needs_kserve
def test_kserve_numbers(kserve):
    """Numbers sent as a list instead of raw bytes are answered alike."""
    assert kserve["predicted"]["outputs"] == kserve["numbers"]["outputs"]


@pytest.mark.needs_node
def test_node_repository(node):
    """A model is unloaded and loaded."""
    ready, gone = {"surface/1": "READY", "spare/1": "READY"}, {"surface/1": "READY", "spare/1": "UNAVAILABLE"}

    assert [ready, gone, ready] == node["repository"]


@pytest.mark.needs_node
def test_node_by_reflection(node, ours):
    """The server's reflection is all that a client needs: no proto file."""
    assert {"inference.GRPCInferenceService", "camserve.v1.ExplanationService"} <= set(node["services"])
    assert same(ours["one"].heatmaps[0], node["reflected"], "heatmap")


@pytest.mark.parametrize(
    "client",
    [
        pytest.param("blocking", id="triton", marks=pytest.mark.needs_tritonclient),
        pytest.param("awaited", id="triton-aio", marks=pytest.mark.needs_tritonclient),
        pytest.param("node", id="node", marks=pytest.mark.needs_node),
    ],
)
class TestStream:
    """ModelStreamInfer; KServe's client has no call for it."""

    @pytest.fixture
    def replies(self, request: pytest.FixtureRequest, client: str) -> list[Mapping[str, Any]]:
        """What came on the stream."""
        if client == "node":
            return request.getfixturevalue("node")["stream"]
        return request.getfixturevalue("triton")[client]["stream"]

    def test_prediction_comes_first(self, replies, ours):
        """The prediction, then each heatmap by itself, and the last of them says that it is the last."""
        first = [reply for reply in replies if reply.get("id") == "first"]

        assert {("heatmap:0",), ("heatmap:1",)} == {tuple(reply["outputs"]) for reply in first[1:]}
        assert ["probabilities"] == list(first[0]["outputs"])
        assert [False, False, True] == [reply["parameters"].get("triton_final_response", False) for reply in first]
        for reply in first[1:]:
            (name,) = reply["outputs"]
            assert same(ours["several"].heatmaps[int(name[-1])], reply, name)

    def test_errors_leave_the_stream_open(self, replies):
        """A request that is wrong is told of in its turn; those before and after it are answered."""
        (error,) = (reply for reply in replies if "message" in reply)

        assert "nobody" in error["message"]


@pytest.mark.needs_tritonclient
def test_triton_empty_final_response(triton):
    """Who asks for it gets an answer without outputs at the end of a request, which then has the final flag alone."""
    last = [reply for reply in triton["blocking"]["stream"] if reply.get("id") == "last"]

    assert [["logits", "probabilities"], []] == [list(reply["outputs"]) for reply in last]
    assert [False, True] == [reply["parameters"].get("triton_final_response", False) for reply in last]


@pytest.mark.needs_tritonclient
def test_triton_errors_of_grpc(triton):
    """Who asks for statuses in place of messages gets the stream's end, with the status of the first error."""
    ended = triton["blocking"]["stream ended"]

    assert "StatusCode.NOT_FOUND" == ended["status"]
    assert "nobody" in ended["message"]


@pytest.mark.needs_tritonclient
def test_triton_leaves_a_stream(triton):
    """The prediction is there while the map is being made; cancelling gives that up, and the device is free for others."""
    found = triton["blocking"]

    assert ["logits", "probabilities"] == list(found["before leaving"]["outputs"])
    assert "StatusCode.CANCELLED" == found["left"]["status"]
    assert found["predicted"]["outputs"] == found["after leaving"]["outputs"]


@pytest.mark.needs_tritonclient
def test_triton_statistics(triton):
    """What was inferred is counted."""
    assert [["surface", "1", True, True]] == triton["blocking"]["statistics"]

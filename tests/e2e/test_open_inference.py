"""The Open Inference Protocol through a real server and channel, with messages of a second copy of the protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from support import oip
from support.nets import TinyNet
from support.servers import Metrics, script_source, until

from camserve.client import Client, Kth, Spec, TensorInput, TopK
from camserve.server.oip import messages


@pytest.fixture
def stub(demo_server) -> Iterator[oip.Stub]:
    """The demo server's calls."""
    with grpc.insecure_channel(demo_server.target) as channel:
        yield oip.Stub(channel)


@pytest.fixture(scope="module")
def row() -> np.ndarray:
    """One row of the demo model's own input."""
    return np.random.default_rng(3).standard_normal((3, 160, 160), np.float32)


@contextlib.contextmanager
def refused(code: grpc.StatusCode, *said: str) -> Iterator[list[error_details_pb2.ErrorInfo]]:
    """Expects a status of that code whose text says all of that; gives its ErrorInfo."""
    infos: list[error_details_pb2.ErrorInfo] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield infos
    assert code is caught.value.code(), caught.value.details()
    for part in said:
        assert part in caught.value.details()
    status = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    infos.append(info)


def test_two_copies_of_the_protocol_live_together():
    """The foreign copy's classes are others than the server's, under the same names."""
    foreign = oip.message("ModelInferRequest")
    assert foreign.DESCRIPTOR.full_name == messages.ModelInferRequest.DESCRIPTOR.full_name
    assert foreign.DESCRIPTOR.file.pool is not messages.POOL


def test_the_server_tells_of_itself(stub):
    """It is live and ready, and names its extensions."""
    assert stub.ServerLive(oip.message("ServerLiveRequest")).live
    assert stub.ServerReady(oip.message("ServerReadyRequest")).ready
    told = stub.ServerMetadata(oip.message("ServerMetadataRequest"))
    assert "camserve" == told.name
    assert told.version
    assert {"explain", "parameters", "classification", "model_repository", "statistics"} <= set(told.extensions)


def test_models_are_ready_or_not(stub):
    """The demo model is; one that nobody knows is not, which is no error."""
    assert stub.ModelReady(oip.message("ModelReadyRequest", name="surface")).ready
    assert not stub.ModelReady(oip.message("ModelReadyRequest", name="nobody")).ready
    assert not stub.ModelReady(oip.message("ModelReadyRequest", name="surface", version="7")).ready


def test_metadata_names_inputs_and_outputs(stub, client):
    """Everything that can be sent and asked for, the batch first."""
    card = client.model("surface")
    told = stub.ModelMetadata(oip.message("ModelMetadataRequest", name="surface"))

    tensors = {entry.name: (entry.datatype, list(entry.shape)) for entry in (*told.inputs, *told.outputs)}
    classes = len(card.labels)
    assert {
        "input": ("FP32", [-1, 3, 160, 160]),
        "image": ("BYTES", [-1, 1]),
        "logits": ("FP32", [-1, classes]),
        "probabilities": ("FP32", [-1, classes]),
        "heatmap": ("FP32", [-1, -1, -1]),
    } == tensors
    assert ["1"] == list(told.versions)


def test_configuration_tells_what_clients_read(stub):
    """The most rows of a request, and inputs of which one may be left out."""
    config = stub.ModelConfig(oip.message("ModelConfigRequest", name="surface")).config

    assert ("surface", "camserve", 16) == (config.name, config.backend, config.max_batch_size)
    assert {"input": True, "image": True} == {given.name: given.optional for given in config.input}


def test_a_plain_request_gets_plain_predictions(stub, client, row):
    """Without outputs asked for, the model's own come and nothing else; they are our own client's numbers."""
    response = stub.ModelInfer(oip.request("surface", {"input": row[None]}, id="7"))

    assert ("surface", "1", "7") == (response.model_name, response.model_version, response.id)
    found = oip.arrays(response)
    assert ["logits", "probabilities"] == list(found)
    ours = client.explain(TensorInput(row), model="surface", top_k=5).prediction
    expected = {entry.class_index: (entry.logit, entry.probability) for entry in ours.classes}
    for index, (logit, probability) in expected.items():
        assert np.float32(logit) == found["logits"][0, index]
        assert np.float32(probability) == found["probabilities"][0, index]
    assert found["probabilities"].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "uint8"])
@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_every_type_of_tensor(stub, kind, typed, batched):
    """What fits into the model's type is the same input, whatever it is sent as; a lone row may leave the batch out."""
    values = np.random.default_rng(5).integers(0, 9, (3, 160, 160)).astype(kind)
    expected = oip.arrays(stub.ModelInfer(oip.request("surface", {"input": values[None].astype("float32")})))
    asked = oip.request("surface", {"input": values[None] if batched else values}, typed=typed and kind != "float16")

    assert oip.arrays(stub.ModelInfer(asked))["logits"].tobytes() == expected["logits"].tobytes()


def test_bfloat16_goes_raw(stub):
    """The upper half of a float32 is taken as what it stands for."""
    values = np.random.default_rng(5).integers(0, 9, (1, 3, 160, 160)).astype("float32")
    asked = oip.message("ModelInferRequest", model_name="surface")
    asked.inputs.add(name="input", datatype="BF16", shape=values.shape)
    asked.raw_input_contents.append((values.view("<u4") >> 16).astype("<u2").tobytes())

    expected = oip.arrays(stub.ModelInfer(oip.request("surface", {"input": values})))
    assert expected["logits"].tobytes() == oip.arrays(stub.ModelInfer(asked))["logits"].tobytes()


@pytest.mark.parametrize("typed", [False, True])
def test_files_are_decoded_as_ever(stub, client, samples, typed):
    """An image file gives our own client's prediction and map, bit for bit."""
    data = samples[0].read_bytes()
    response = stub.ModelInfer(oip.request("surface", {"image": [data]}, ["logits", "heatmap"], typed=typed))

    ours = client.explain(data, model="surface", specs=[Spec("grad-cam", encoding="float32")])
    found = oip.arrays(response)
    assert ours.heatmaps[0].values.tobytes() == found["heatmap"][0].tobytes()
    assert np.float32(ours.prediction.classes[0].logit) == found["logits"].max()


def test_pixels_are_preprocessed_as_frames(stub, samples):
    """RGB pixels and the lossless file of them are the same picture."""
    with Image.open(samples[0]) as image:
        pixels = np.asarray(image.convert("RGB"))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")

    by_file = oip.arrays(stub.ModelInfer(oip.request("surface", {"image": [file.getvalue()]})))
    by_pixels = oip.arrays(stub.ModelInfer(oip.request("surface", {"image": pixels})))

    np.testing.assert_allclose(by_file["logits"], by_pixels["logits"], rtol=1e-4, atol=1e-4)


METHODS = ("grad-cam", "layercam", "eigen-cam", "score-cam", "smoothgrad", "vanilla-backprop")


@pytest.mark.parametrize("method", METHODS)
def test_maps_equal_our_own_clients(stub, client, row, method):
    """The same tensor explained through either protocol gives the same bits and the same facts."""
    options = {"samples": 4} if method == "smoothgrad" else {}
    asked = {"heatmap:0": {"method": method, **options}}
    response = stub.ModelInfer(oip.request("surface", {"input": row[None]}, asked))

    (ours,) = client.explain(
        TensorInput(row), model="surface", specs=[Spec(method, encoding="float32", **options)]
    ).heatmaps
    (values,) = oip.arrays(response)["heatmap:0"]
    assert ours.values.tobytes() == values.tobytes()
    told = oip.facts(response, "heatmap:0")
    assert (method, ours.raw_sha256, ",".join(ours.layers)) == (told["method"], told["raw_sha256"], told["layer"])
    assert (float(values.min()), float(values.max())) == (told["value_min"], told["value_max"])


def test_several_explanations_share_one_pass(stub, client, row, demo_server):
    """Outputs that differ in method, layer and target are one pass, and come in the order asked for."""
    metrics = Metrics(demo_server)
    before = metrics.value("camserve_batch_rows_count", model="surface")
    asked = {
        "heatmap:why": {"method": "layercam", "layer": "layer2", "target": 3},
        "probabilities": {},
        "heatmap:grad-cam": {"target": "stain", "score": "softmax"},
        "heatmap": {"method": "hirescam", "layer": "layer2,layer3", "fusion": "max", "rectify": "false"},
    }
    response = stub.ModelInfer(oip.request("surface", {"input": row[None]}, asked))

    assert 1 == metrics.value("camserve_batch_rows_count", model="surface") - before
    assert list(asked) == [output.name for output in response.outputs]
    found = oip.arrays(response)
    specs = [
        Spec("layercam", layers=["layer2"], target=3, encoding="float32"),
        Spec("grad-cam", target="stain", score="softmax", encoding="float32"),
        Spec("hirescam", layers=["layer2", "layer3"], fusion="max", rectify=False, encoding="float32"),
    ]
    ours = client.explain(TensorInput(row), model="surface", specs=specs).heatmaps
    for heatmap, name in zip(ours, ("heatmap:why", "heatmap:grad-cam", "heatmap"), strict=True):
        assert heatmap.values.tobytes() == found[name][0].tobytes()
        assert heatmap.target.class_index == oip.facts(response, name)["target"]


def test_request_parameters_are_defaults(stub, row):
    """Those of the request hold for all heatmaps, those with an output's name for it, and its own come last."""
    asked = oip.request(
        "surface",
        {"input": row[None]},
        {"heatmap:0": {}, "heatmap:1": {}, "heatmap:2": {"method": "hirescam"}},
        parameters={"explain.method": "layercam", "explain.layer": "layer2", "heatmap:1.method": "eigen-cam"},
    )
    response = stub.ModelInfer(asked)

    told = [oip.facts(response, f"heatmap:{place}") for place in range(3)]
    assert ["layercam", "eigen-cam", "hirescam"] == [facts["method"] for facts in told]
    assert ["layer2"] * 3 == [facts["layer"] for facts in told]


def test_numbers_may_be_texts(stub, row):
    """A client whose parameters know no numbers gets what one gets whose do."""
    told = []
    for options in ({"samples": 4, "noise": 0.25, "target": 2}, {"samples": "4", "noise": "0.25", "target": "2"}):
        asked = {"heatmap": {"method": "smoothgrad", **options}}
        told.append(oip.arrays(stub.ModelInfer(oip.request("surface", {"input": row[None]}, asked)))["heatmap"])

    assert told[0].tobytes() == told[1].tobytes()


@pytest.mark.parametrize(("encoding", "datatype"), [("float32", "FP32"), ("float16", "FP16"), ("uint8", "UINT8")])
def test_cells_come_as_tensors(stub, row, encoding, datatype):
    """Codes and halves stand for the exact values within their loss."""
    asked = {"exact": {}, "other": {"format": encoding}}
    asked = {f"heatmap:{name}": {"method": "layercam", **options} for name, options in asked.items()}
    response = stub.ModelInfer(oip.request("surface", {"input": row[None]}, asked))

    assert datatype == response.outputs[1].datatype
    found, told = oip.arrays(response), oip.facts(response, "heatmap:other")
    span = told["value_max"] - told["value_min"]
    values = found["heatmap:other"].astype(np.float64)
    if encoding == "uint8":
        values = told["value_min"] + values / 255 * span
    np.testing.assert_allclose(found["heatmap:exact"], values, rtol=0, atol=span / 400)


@pytest.mark.parametrize("form", ["png8", "overlay-png", "overlay-jpeg", "overlay-webp"])
def test_pictures_come_as_files(stub, samples, form):
    """One file for each row, of the size asked for."""
    response = stub.ModelInfer(
        oip.request("surface", {"image": [samples[0].read_bytes()]}, {"heatmap": {"format": form, "size": "source"}})
    )

    (file,) = oip.arrays(response)["heatmap"]
    with Image.open(samples[0]) as source, Image.open(io.BytesIO(file)) as sent:
        assert source.size == sent.size


def test_a_batch_is_rows_of_one_pass(stub, client, serve, tmp_path):
    """Rows are answered as alone, in order, and share passes."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), batch_window_seconds=1, max_batch_rows=8)
    rows = np.random.default_rng(1).standard_normal((8, 3, 32, 32), np.float32)
    metrics = Metrics(server)
    with grpc.insecure_channel(server.target) as channel, Client(server.target) as own:
        response = oip.Stub(channel).ModelInfer(oip.request("tiny", {"input": rows}, ["logits", "heatmap"]))
        passes = metrics.value("camserve_batch_rows_count", model="tiny")
        alone = [
            own.explain(TensorInput(one), model="tiny", specs=[Spec("grad-cam", encoding="float32")]) for one in rows
        ]

    found = oip.arrays(response)
    assert passes < len(rows)
    assert (8, 4) == found["logits"].shape
    assert (8, 8, 8) == found["heatmap"].shape
    for place, ours in enumerate(alone):
        np.testing.assert_allclose(ours.heatmaps[0].values, found["heatmap"][place], rtol=1e-4, atol=1e-6)
        assert ours.prediction.classes[0].class_index == found["logits"][place].argmax()
    assert [ours.heatmaps[0].target.class_index for ours in alone] == json.loads(
        oip.facts(response, "heatmap")["target"]
    )


def test_files_of_a_batch_may_differ_in_size(stub, client, samples):
    """Each is brought to the model's size by itself."""
    files = [sample.read_bytes() for sample in samples[:3]]
    found = oip.arrays(stub.ModelInfer(oip.request("surface", {"image": files}, ["logits", "heatmap"])))

    ours = [client.explain(file, model="surface").prediction.classes[0].class_index for file in files]
    assert ours == found["logits"].argmax(axis=1).tolist()
    assert 3 == len(found["heatmap"])


def test_several_maps_of_one_output(stub, client, row):
    """The best classes are an axis behind the batch's, and facts become lists."""
    asked = {"heatmap": {"target": json.dumps({"top": {"k": 3}})}}
    response = stub.ModelInfer(oip.request("surface", {"input": row[None]}, asked))

    ours = client.explain(
        TensorInput(row), model="surface", specs=[Spec("grad-cam", target=TopK(3), encoding="float32")]
    ).heatmaps
    ((*maps,),) = oip.arrays(response)["heatmap"]
    assert [heatmap.values.tobytes() for heatmap in ours] == [found.tobytes() for found in maps]
    assert [heatmap.target.class_index for heatmap in ours] == json.loads(oip.facts(response, "heatmap")["target"])


def test_targets_as_tables(stub, client, row):
    """What the contract can ask about can be asked as JSON in its words."""
    asked = {"heatmap": {"target": json.dumps({"kth": {"k": 2}, "polarity": "against"})}}
    found = oip.arrays(stub.ModelInfer(oip.request("surface", {"input": row[None]}, asked)))["heatmap"]

    spec = Spec("grad-cam", target=Kth(2), polarity="against", encoding="float32")
    assert (
        client.explain(TensorInput(row), model="surface", specs=[spec]).heatmaps[0].values.tobytes()
        == found[0].tobytes()
    )


def test_best_classes_as_texts(stub, client, row):
    """`classification` gives value, index and label of the best, as Triton's clients read them."""
    asked = {"probabilities": {"classification": 2}}
    ((first, second),) = oip.arrays(stub.ModelInfer(oip.request("surface", {"input": row[None]}, asked)))[
        "probabilities"
    ]

    best = client.explain(TensorInput(row), model="surface", top_k=2).prediction.classes
    for entry, told in zip(best, (first, second), strict=True):
        assert f"{entry.probability:f}:{entry.class_index}:{entry.label}" == told.decode()


BAD = [
    ({"inputs": {"input": np.zeros((1, 3, 160, 161), "float32")}}, "INVALID_ARGUMENT", ("does not fit the model",)),
    ({"inputs": {"input": np.zeros((3, 160), "float32")}}, "INVALID_ARGUMENT", ("2 axes", "3 for one row")),
    ({"inputs": {"input": np.zeros((17, 3, 160, 160), "uint8")}}, "INVALID_ARGUMENT", ("17 rows", "at most 16")),
    ({"inputs": {"inputs": np.zeros((1, 3, 160, 160), "float32")}}, "INVALID_ARGUMENT", ("did you mean 'input'",)),
    ({"inputs": {"input": np.zeros((3, 160, 160), "int64")}}, "INVALID_ARGUMENT", ("FP32, FP16",)),
    ({"inputs": {}}, "INVALID_ARGUMENT", ("input or image",)),
    ({"inputs": {"image": [b"no picture"]}}, "INVALID_ARGUMENT", ("cannot be decoded",)),
    ({"inputs": {"image": np.zeros((3, 9, 9), "uint8")}}, "INVALID_ARGUMENT", ("[N, height, width, 3]",)),
    ({"inputs": {"image": np.zeros((9, 9, 3), "float32")}}, "INVALID_ARGUMENT", ("as 'input'",)),
    ({"inputs": {"input": np.full((3, 160, 160), np.nan, "float32")}}, "INVALID_ARGUMENT", ("NaN",)),
    ({"outputs": ["heat"]}, "INVALID_ARGUMENT", ("'heat' is unknown", "heatmap")),
    ({"outputs": {"heatmap": {"methode": "cam"}}}, "INVALID_ARGUMENT", ("did you mean 'method'",)),
    ({"outputs": {"heatmap": {"method": "gradcam"}}}, "INVALID_ARGUMENT", ("did you mean 'grad-cam'",)),
    ({"outputs": {"heatmap": {"layer": "layer9"}}}, "NOT_FOUND", ("layer9", "near names")),
    ({"outputs": {"heatmap": {"target": "dragon"}}}, "NOT_FOUND", ("dragon", "its labels are")),
    ({"outputs": {"heatmap": {"target": 99}}}, "INVALID_ARGUMENT", ("99",)),
    ({"outputs": {"heatmap": {"target": "{}}"}}}, "INVALID_ARGUMENT", ("no JSON",)),
    ({"outputs": {"heatmap": {"samples": 0.5}}}, "INVALID_ARGUMENT", ("whole number",)),
    ({"outputs": {"heatmap": {"target": r'{"above": {"probability": "\ud800"}}'}}}, "INVALID_ARGUMENT", ("no JSON",)),
    ({"outputs": {"heatmap": {"format": "overlay-png"}}}, "INVALID_ARGUMENT", ("outputs[heatmap].encoding",)),
    ({"outputs": {"logits": {"method": "cam"}}}, "INVALID_ARGUMENT", ("classification",)),
    ({"parameters": {"explain.methd": "cam"}}, "INVALID_ARGUMENT", ("explain.method",)),
    ({"parameters": {"method": "cam"}}, "INVALID_ARGUMENT", ("'explain.method'",)),
    ({"parameters": {"triton_foo": 1}}, "INVALID_ARGUMENT", ("triton_foo",)),
    ({"parameters": {"priority": "high"}}, "INVALID_ARGUMENT", ("parameters[priority]",)),
    ({"parameters": {"timeout": -1}}, "INVALID_ARGUMENT", ("microseconds",)),
    ({"parameters": {"sequence_id": 3}}, "UNIMPLEMENTED", ("sequence_id",)),
    ({"model": "surfaces"}, "NOT_FOUND", ("did you mean 'surface'",)),
    ({"model": ""}, "INVALID_ARGUMENT", ("model_name is required",)),
    ({"model_version": "9"}, "NOT_FOUND", ("no version '9'",)),
    ({"id": "x" * 129}, "INVALID_ARGUMENT", ("128",)),
]


@pytest.mark.parametrize(("changes", "code", "said"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_are_told_what_to_do(stub, changes, code, said):
    """Every refusal has a code that Triton's clients know, a reason, and a text that says what would be right."""
    asked = {"model": "surface", "inputs": {"input": np.zeros((3, 160, 160), "float32")}, **changes}
    with refused(grpc.StatusCode[code], *said):
        stub.ModelInfer(oip.request(**asked))


def test_a_deadline_may_be_a_parameter(stub, row):
    """`timeout` counts in microseconds, and what passed is told as such."""
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED) as infos:
        stub.ModelInfer(
            oip.request(
                "surface", {"input": row[None]}, {"heatmap": {"method": "score-cam"}}, parameters={"timeout": 1}
            )
        )
    assert "DEADLINE_EXCEEDED" == infos[0].reason


def test_requests_are_counted_as_explanations_are(stub, demo_server, row, log_lines):
    """One instrument for both protocols, and priorities are lanes."""
    metrics = Metrics(demo_server)
    before = metrics.value("camserve_requests_total", model="surface", code="OK")
    stub.ModelInfer(oip.request("surface", {"input": row[None]}, id="an-id", parameters={"priority": 1}))

    assert 1 == metrics.value("camserve_requests_total", model="surface", code="OK") - before


@pytest.mark.parametrize(
    "name",
    ["SystemSharedMemoryRegister", "CudaSharedMemoryStatus", "TraceSetting", "LogSettings"],
)
def test_what_is_not_built_says_so(stub, name):
    """Shared memory, traces and logs answer UNIMPLEMENTED with what to do instead."""
    with refused(grpc.StatusCode.UNIMPLEMENTED, name) as infos:
        getattr(stub, name)(oip.message(f"{name}Request"))
    assert "FEATURE_NOT_IMPLEMENTED" == infos[0].reason


def test_reflection_shows_the_service(demo_server):
    """Whoever knows no protos finds the service, its file and its messages."""
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="camserve.v1.ModelService"),
        reflection_pb2.ServerReflectionRequest(file_by_filename="inference/open_inference.proto"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.Nothing"),
    ]
    with grpc.insecure_channel(demo_server.target) as channel:
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
        services, service, ours, file, nothing = reflect.ServerReflectionInfo(iter(asked))

    assert "inference.GRPCInferenceService" in [entry.name for entry in services.list_services_response.service]
    for found in (service, file):
        (proto,) = found.file_descriptor_response.file_descriptor_proto
        assert "inference/open_inference.proto" == descriptor_pb2.FileDescriptorProto.FromString(proto).name
    assert ours.file_descriptor_response.file_descriptor_proto
    assert grpc.StatusCode.NOT_FOUND.value[0] == nothing.error_response.error_code


def test_the_repository_can_be_asked_and_changed(serve, tmp_path):
    """Index, unload and load as our own API has them, in Triton's dialect and in KServe's."""
    server = serve(script_source("tiny", TinyNet(), tmp_path))
    load, unload = ("RepositoryModelLoadRequest", "RepositoryModelUnloadRequest")

    def listed(stub: oip.Stub, **asked: bool) -> list[tuple[str, str, str]]:
        index = stub.RepositoryIndex(oip.message("RepositoryIndexRequest", **asked))
        return [(entry.name, entry.version, entry.state) for entry in index.models]

    with grpc.insecure_channel(server.target) as channel:
        stub = oip.Stub(channel)
        assert [("tiny", "1", "READY")] == listed(stub)
        for field in ("model_name", "repository_name"):
            stub.RepositoryModelUnload(oip.message(unload, **{field: "tiny"}))
            assert [("tiny", "1", "UNAVAILABLE")] == listed(stub)
            assert [] == listed(stub, ready=True)
            assert not stub.ModelReady(oip.message("ModelReadyRequest", name="tiny")).ready
            with refused(grpc.StatusCode.NOT_FOUND, "was unloaded"):
                stub.ModelInfer(oip.request("tiny", {"input": np.zeros((3, 32, 32), "float32")}))
            answer = stub.RepositoryModelLoad(oip.message(load, **{field: "tiny"}))
            assert ("tiny", True) == (answer.model_name, answer.is_loaded)
            assert [("tiny", "1", "READY")] == listed(stub, ready=True)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "no model repository"):
            stub.RepositoryModelLoad(oip.message(load, model_name="other"))
        config = {"config": oip.message("ModelRepositoryParameter", string_param="{}")}
        with refused(grpc.StatusCode.UNIMPLEMENTED, "parameters[config]"):
            stub.RepositoryModelLoad(oip.message(load, model_name="tiny", parameters=config))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "model_name is required"):
            stub.RepositoryModelUnload(oip.message(unload))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "one repository"):
            stub.RepositoryIndex(oip.message("RepositoryIndexRequest", repository_name="r"))


def test_a_full_server_is_unavailable(serve, tmp_path):
    """What camserve's own API calls RESOURCE_EXHAUSTED is UNAVAILABLE here, with the same reason and a time to come back."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), max_requests=1, caller_concurrency=0)
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        oip.Stub(channel).ModelInfer(oip.request("tiny", {"input": np.zeros((2, 3, 32, 32), "float32")}))

    assert grpc.StatusCode.UNAVAILABLE is caught.value.code()
    status = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert any(detail.Unpack(retry) for detail in status.details)
    assert ("QUEUE_FULL", 14) == (info.reason, status.code)


async def test_statistics_are_those_of_the_metrics_page(serve, tmp_path):
    """Rows by passes is the mean batch; what fails is counted apart; versions and models are told one by one."""
    first, second = script_source("tiny", TinyNet(), tmp_path), script_source("other", TinyNet(), tmp_path)
    server = serve(first, dataclasses.replace(first, version="2"), second, batch_window_seconds=1)
    with grpc.insecure_channel(server.target) as channel:
        stub = oip.Stub(channel)

        def told(**asked: str) -> list[Any]:
            return list(stub.ModelStatistics(oip.message("ModelStatisticsRequest", **asked)).model_stats)

        rows = np.zeros((4, 3, 32, 32), "float32")
        stub.ModelInfer(oip.request("tiny", {"input": rows}, ["heatmap"], model_version="1"))
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            stub.ModelInfer(oip.request("tiny", {"input": rows}, {"heatmap": {"target": 9}}, model_version="1"))
        # The last pass and the last status are written down when their answers are on their way.
        await until(lambda: (told()[1].inference_count, told()[1].inference_stats.fail.count) == (4, 1))
        everything, both = told(), told(name="tiny")
        (one,) = told(name="tiny", version="1")
        with refused(grpc.StatusCode.NOT_FOUND, "known models: other, tiny"):
            told(name="nobody")

    assert [("other", "1"), ("tiny", "1"), ("tiny", "2")] == [(entry.name, entry.version) for entry in everything]
    assert ["1", "2"] == [entry.version for entry in both]
    assert [0, 4, 0] == [entry.inference_count for entry in everything]
    assert Metrics(server).value("camserve_batch_rows_count", model="tiny", version="1") == one.execution_count
    stages = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    assert (4, 4, 4, 4, 4) == tuple(getattr(one.inference_stats, name).count for name in stages)
    assert one.inference_stats.compute_infer.ns > 0
    assert ["CPU"] == [usage.type for usage in one.memory_usage if usage.byte_size > 0]


def test_readiness_is_told_apart(serve, tmp_path):
    """While models are loaded, those that are there are ready, though the server is not; while it hangs, nothing is."""
    server = serve(script_source("tiny", TinyNet(), tmp_path))
    health = server.app._health

    with grpc.insecure_channel(server.target) as channel:
        stub = oip.Stub(channel)

        def told() -> tuple[bool, bool, bool]:
            return (
                stub.ServerLive(oip.message("ServerLiveRequest")).live,
                stub.ServerReady(oip.message("ServerReadyRequest")).ready,
                stub.ModelReady(oip.message("ModelReadyRequest", name="tiny")).ready,
            )

        assert (True, True, True) == told()
        server.run(health.set_server(is_serving=False)).result()
        assert (True, False, True) == told()
        server.run(health.set_server(is_serving=True)).result()
        health.set_stall("the device thread hangs")
        assert (False, False, False) == told()
        health.set_stall("")
        assert (True, True, True) == told()

"""Requests of the Open Inference Protocol: whatever arrives is read or refused with a reason; what is read is what was said."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from support.cards import LABELS, card
from support.oip_requests import INTEGERS, requests

from camserve.server import jobs
from camserve.server.errors import CamserveError, InvalidRequest, NotFound, Reason, Unsupported
from camserve.server.models.card import ExtraInput
from camserve.server.oip.messages import InferParameter, ModelInferRequest
from camserve.server.oip.options import OPTIONS, read_options
from camserve.server.oip.parameters import number, parameter, switch, values, whole
from camserve.server.oip.requests import Asked, WantedHeatmap, read_request
from camserve.server.oip.tensors import read_inputs
from camserve.server.oip.terms import read_terms
from camserve.server.validate import RequestLimits

LIMITS = RequestLimits(max_specs=8, max_maps=32)


def asked(request: Any, of: Any = None) -> Asked:
    """The request, read as the servicer reads it."""
    return read_request(
        request, read_terms(request), of or card(), LIMITS, received_at=10.0, deadline=None, caller="somebody"
    )


def request(**changes: Any) -> Any:
    """A request with one row, in order."""
    made = ModelInferRequest(model_name="tiny")
    made.inputs.add(name="input", datatype="FP32", shape=(3, 32, 32))
    made.raw_input_contents.append(bytes(3 * 32 * 32 * 4))
    made.MergeFrom(ModelInferRequest(**changes))
    return made


def with_output(name: str = "heatmap", **options: Any) -> Any:
    """A request for one output."""
    made = request()
    output = made.outputs.add(name=name)
    for option, value in options.items():
        output.parameters[option].CopyFrom(parameter(value))
    return made


def spec_of(**options: Any) -> jobs.Spec:
    """What a heatmap's parameters mean."""
    return read_options(0, "heatmap", options, card())


@given(message=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(message):
    """No message that protobuf takes ends in anything but an answer or a documented error."""
    try:
        made = ModelInferRequest.FromString(message)
    except DecodeError:
        return
    with_reason(made)


def with_reason(made: Any) -> Asked | None:
    """Reads a request; None where it was refused, as it should be: with a reason and a text."""
    error: CamserveError | None = None
    try:
        return asked(made, card(extra_inputs=(ExtraInput(name="mask", shape=(2,), dtype="float32"),)))
    except CamserveError as raised:
        error = raised
    assert error.message
    assert error.reason in set(Reason) - {Reason.INTERNAL}
    return None


@given(made=requests())
def test_nearly_right_requests_are_read_or_refused(made):
    """And what is read has a job for each row, each with as many specs as there are heatmaps, and enough bytes."""
    found = with_reason(made)
    if found is None:
        return
    assert found.jobs
    for job in found.jobs:
        assert len(found.heatmaps) == len(job.specs)
        if isinstance(job.payload, jobs.TensorInput):
            size = {"bfloat16": 2}.get(job.payload.dtype) or np.dtype(job.payload.dtype).itemsize
            assert np.prod(job.payload.shape) * size == len(job.payload.data)


@given(elements=st.lists(st.binary(max_size=9), min_size=1, max_size=5))
def test_bytes_come_out_as_they_went_in(elements):
    """Raw and typed alike, empty ones too."""
    made = ModelInferRequest()
    made.inputs.add(name="image", datatype="BYTES", shape=[len(elements)])
    made.raw_input_contents.append(b"".join(struct.pack("<I", len(one)) + one for one in elements))
    assert tuple(elements) == read_inputs(made)["image"].elements
    del made.raw_input_contents[:]
    made.inputs[0].contents.bytes_contents.extend(elements)
    assert tuple(elements) == read_inputs(made)["image"].elements


@pytest.mark.parametrize(
    ("data", "shape", "said"),
    [
        (b"\1\0\0", [1], "inside a length"),
        (b"\5\0\0\0ab", [1], "inside an element of 5 bytes: 2 are left"),
        (b"\xff\xff\xff\xff", [1], "4294967295"),
        (b"\0\0\0\0", [2], "takes 2 elements; 1 came"),
        (b"\0\0\0\0" * 3, [2], "takes 2 elements; 3 came"),
        (b"", [70000], "at most 65536"),
    ],
)
def test_bytes_that_do_not_add_up(data, shape, said):
    """Lengths are not believed."""
    made = ModelInferRequest(raw_input_contents=[data])
    made.inputs.add(name="image", datatype="BYTES", shape=shape)

    with pytest.raises(InvalidRequest, match=said):
        read_inputs(made)


def test_contents_are_raw_or_typed():
    """Raw ones are for all inputs; both at once are refused, as one of them would go unread."""
    made = request()
    made.inputs[0].contents.fp32_contents.append(1)
    with pytest.raises(InvalidRequest, match="both raw and typed"):
        read_inputs(made)
    made = request()
    made.inputs.add(name="mask", datatype="FP32", shape=[1])
    with pytest.raises(InvalidRequest, match="1 for 2 inputs"):
        read_inputs(made)


def test_shared_memory_is_refused():
    """For inputs and outputs, with what to do instead."""
    made = request()
    made.inputs[0].parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(Unsupported, match="send it in the request"):
        asked(made)
    with pytest.raises(Unsupported, match="leave those parameters out"):
        asked(with_output(shared_memory_region="r"))


@given(value=INTEGERS)
def test_whole_numbers_are_exact(value):
    """Up to 64 bits, as numbers and as texts."""
    assert value == whole(value, "x") == whole(str(value), "x") == whole(f" {value}", "x")


@pytest.mark.parametrize("value", ["", "one", "1.5", "nan", "1e400", True, 0.5, float("inf"), "9" * 400])
def test_what_is_no_whole_number(value):
    """Truth values are none either."""
    with pytest.raises(InvalidRequest, match=r"whole number|finite number"):
        whole(value, "x")


@pytest.mark.parametrize(("value", "expected"), [("2.5", 2.5), (2, 2.0), (0.5, 0.5), ("1e-3", 0.001)])
def test_numbers(value, expected):
    """With a point or not, as text or not."""
    assert expected == number(value, "x")


@pytest.mark.parametrize(("value", "expected"), [(True, True), ("true", True), ("False", False)])
def test_truth_values(value, expected):
    """As text as well; a number is none."""
    assert expected is switch(value, "x")
    with pytest.raises(InvalidRequest, match="must be true or false"):
        switch(1, "x")


def test_a_parameter_without_a_value_is_refused():
    """It would otherwise pass for false, 0 and an empty text."""
    with pytest.raises(InvalidRequest, match=r"parameters\[a\] has no value"):
        values({"a": InferParameter()}, "parameters")


@pytest.mark.parametrize(
    ("said", "about"),
    [
        ("predicted", jobs.Predicted()),
        (2, jobs.ClassIndex(2)),
        ("2", jobs.ClassIndex(2)),
        (" -1 ", jobs.ClassIndex(-1)),
        ("crane", jobs.ClassIndex(LABELS.index("crane"))),
        ('{"class_label": "dog"}', jobs.ClassIndex(1)),
        ('{"kth": {"k": 2}}', jobs.KthClass(2)),
        ('{"difference": {"class_index": 1, "other_class_index": 0}}', jobs.Difference(1, 0)),
        ("{}", jobs.Predicted()),
    ],
)
def test_targets(said, about):
    """An index, a label, a word, or a table of the contract."""
    assert about == spec_of(target=said).target.about


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("{", InvalidRequest),
        ("{" * 5000, InvalidRequest),
        ('{"kth": 3}', InvalidRequest),
        ('{"class_index": 99999999999}', InvalidRequest),
        ('{"class_index": ' + "9" * 5000 + "}", InvalidRequest),
        ('{"klass": 3}', InvalidRequest),
        (r'{"\ud800": 3}', InvalidRequest),
        (r'{"kth": {"\udfff": 3}}', InvalidRequest),
        (r'{"above": {"probability": "\ud800"}}', InvalidRequest),
        (r'{"class_label": "\ud83d\ude00"}', NotFound),
        ("9" * 30, NotFound),
        ("", NotFound),
        ("eagle", NotFound),
        (True, InvalidRequest),
        (1.5, InvalidRequest),
    ],
)
def test_targets_that_are_none(said, kind):
    """Each is refused by name."""
    with pytest.raises(kind):
        spec_of(target=said)


def test_every_option_reaches_its_field():
    """Nothing that is said goes unheard."""
    spec = spec_of(
        method="score-cam",
        layer="stem, body",
        target="dog",
        score="softmax",
        polarity="against",
        output_path="a.b",
        format="uint8",
        size="input",
        profile="torchcam",
        fusion="max",
        rectify="false",
        normalisation="min-max",
        saliency="gray",
        overlay_opacity="0.25",
        augmentation_smooth=True,
        eigen_smooth="true",
        region_threshold=0.5,
        max_regions=3,
        allow_partial=True,
        seed="7",
        noise=0.5,
        contrast=2,
        **dict.fromkeys(("channels", "samples", "steps", "window", "stride", "concepts", "similar_classes"), 4),
    )

    assert jobs.Spec(
        index=0,
        method="score-cam",
        layers=("stem", "body"),
        target=jobs.Target(
            about=jobs.ClassIndex(1), score=jobs.Score.SOFTMAX, polarity=jobs.Polarity.AGAINST, output_path="a.b"
        ),
        profile=jobs.Profile.TORCHCAM,
        fusion=jobs.Fusion.MAX,
        rectify=False,
        normalisation=jobs.Normalisation.MIN_MAX,
        size=jobs.MapSize.INPUT,
        encoding=jobs.Encoding.UINT8,
        overlay_opacity=0.25,
        parameters=jobs.Parameters(
            channels=4, samples=4, steps=4, window=4, stride=4, concepts=4, similar_classes=4,
            noise=0.5, contrast=2.0, seed=7, allows_partial=True,
        ),
        smoothing=jobs.Smoothing(augmentation=True, eigen=True),
        saliency=jobs.Saliency.GRAY,
        regions=jobs.RegionOptions(threshold=0.5, max_regions=3),
    ) == spec  # fmt: skip
    assert 29 == len(OPTIONS)


def test_tensors_go_as_they_are():
    """Contents of this protocol are cells or a whole file: its clients know no compression on top of that."""
    (heatmap,) = asked(with_output()).heatmaps

    assert not heatmap.spec.may_compress


def test_an_outputs_name_may_be_its_method():
    """Unless a parameter names one; without either it is Grad-CAM, exact."""
    named = read_options(0, "heatmap:layercam", {}, card())
    assert ("layercam", jobs.Encoding.FLOAT32) == (named.method, named.encoding)
    assert "hirescam" == read_options(0, "heatmap:layercam", {"method": "hirescam"}, card()).method
    assert "grad-cam" == read_options(0, "heatmap:my part", {}, card()).method


@pytest.mark.parametrize(
    ("priority", "lane"),
    [(0, "standard"), (1, "interactive"), ("1", "interactive"), (2, "standard"), (3, "bulk"), (2**40, "bulk")],
)
def test_priorities_are_lanes(priority, lane):
    """1 is the most urgent; unsigned as tritonclient sends it."""
    made = request(parameters={"priority": parameter(priority)})
    assert lane == asked(made).jobs[0].lane
    if isinstance(priority, int):
        made.parameters["priority"].uint64_param = priority
        assert lane == asked(made).jobs[0].lane


def test_timeouts_shorten_deadlines():
    """Microseconds from arrival; 0 is none, and gRPC's own deadline stays where it is nearer."""
    assert asked(request(parameters={"timeout": parameter(2_000_000)})).jobs[0].deadline == pytest.approx(12)
    assert asked(request(parameters={"timeout": parameter(0)})).jobs[0].deadline is None
    made = request(parameters={"timeout": parameter(2_000_000)})
    nearer = read_request(made, read_terms(made), card(), LIMITS, received_at=10.0, deadline=11.0, caller="")
    assert 11.0 == nearer.jobs[0].deadline


def test_errors_speak_of_outputs():
    """A spec's place in the job means nothing to a caller who wrote outputs."""
    made = with_output("heatmap:b", layer="boddy")
    made.outputs.add(name="logits")
    with pytest.raises(NotFound) as caught:
        asked(made)
    assert "outputs[heatmap:b].layers[0]" == caught.value.field

    with pytest.raises(InvalidRequest) as caught:
        asked(with_output(format="overlay-png"))
    assert caught.value.message.startswith("outputs[heatmap].encoding overlay-png")


def test_too_many_heatmaps():
    """The limits of camserve's own requests hold, before any is read."""
    made = request()
    for place in range(9):
        made.outputs.add(name=f"heatmap:{place}")

    with pytest.raises(InvalidRequest) as caught:
        asked(made)
    assert Reason.TOO_MANY_SPECS is caught.value.reason


def test_several_maps_are_known_beforehand():
    """Whether they are an axis depends on what is asked, not on what comes."""
    several = {
        '{"top": {"k": 1}}': True,
        '{"above": {"probability": 0.5}}': True,
        "1": False,
    }
    for target, expected in several.items():
        (heatmap,) = asked(with_output(target=target)).outputs
        assert isinstance(heatmap, WantedHeatmap)
        assert expected is heatmap.has_several
    (concepts,) = asked(with_output(method="deep-feature-factorisation", concepts=3)).outputs
    assert isinstance(concepts, WantedHeatmap)
    assert concepts.has_several


def test_ids_are_made_where_there_is_none():
    """So that every request can be found in the log."""
    assert 32 == len(read_terms(request()).request_id)
    assert "a b" == read_terms(request(id="a b")).request_id
    with pytest.raises(InvalidRequest, match="printable"):
        read_terms(request(id="a\nb"))


def test_large_json_is_no_matter():
    """A target may be long; what is refused is told in few words."""
    with pytest.raises(CamserveError):
        spec_of(target=json.dumps({"embedding": {"vector": {"values": [0.5] * 70_000}}}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": [ModelInferRequest.InferInputTensor()] * 1025}, "inputs holds 1026"),
        ({"outputs": [ModelInferRequest.InferRequestedOutputTensor()] * 1025}, "outputs holds 1025"),
        ({"parameters": {str(name): parameter(1) for name in range(257)}}, "parameters holds 257"),
        ({"parameters": {"explain.layer": parameter("a," * 600_000)}}, "1200000 characters"),
        ({"raw_input_contents": [b""] * 100_000}, "100001 for 1 inputs"),
        (
            {
                "inputs": [ModelInferRequest.InferInputTensor(name="b", shape=[1] * 100_000)],
                "raw_input_contents": [b""],
            },
            "100000 sizes",
        ),
    ],
)
def test_what_could_not_be_meant_is_not_gone_through(changes, said):
    """A message holds millions of entries; they are counted before any is looked at."""
    with pytest.raises(InvalidRequest, match=said):
        asked(request(**changes))

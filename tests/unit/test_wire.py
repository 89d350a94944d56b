"""Protobuf in, jobs out; events in, protobuf out: nothing on either side is left without its counterpart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2
from support.cards import LABELS, card, job, spec

from camserve.client import words as client_words
from camserve.server import jobs
from camserve.server.cam.methods import METHODS, Reads
from camserve.server.errors import (
    CamserveError,
    DeadlineExceeded,
    ExecutionFailed,
    InvalidRequest,
    Reason,
    Unsupported,
)
from camserve.server.models.card import ExtraInput, LayerCard, MethodCard, PlanCard, RuleCard
from camserve.server.models.recipe import InputRecipe
from camserve.server.wire import words
from camserve.server.wire.answers import card_message, response
from camserve.server.wire.requests import job_from_request, request_id_of
from camserve.v1 import (
    errors_pb2,
    explanation_service_pb2,
    heatmap_pb2,
    input_pb2,
    model_service_pb2,
    spec_pb2,
)

FILES = (errors_pb2, explanation_service_pb2, heatmap_pb2, input_pb2, model_service_pb2, spec_pb2)
ENUMS = {name: enum for file in FILES for name, enum in file.DESCRIPTOR.enum_types_by_name.items()}
TABLES: dict[str, Mapping[int, object]] = {
    "Compression": words.COMPRESSIONS,
    "DataType": words.DATA_TYPES,
    "Encoding": words.ENCODINGS,
    "Fusion": words.FUSIONS,
    "Lane": words.LANES,
    "LayerLayout": words.LAYOUTS,
    "MapFlag": words.FLAGS,
    "MapSize": words.SIZES,
    "Method": words.METHODS,
    "Normalisation": words.NORMALISATIONS,
    "OutputKind": words.OUTPUT_KINDS,
    "PixelFormat": words.PIXEL_FORMATS,
    "Polarity": words.POLARITIES,
    "Profile": words.PROFILES,
    "ProgramKind": words.KINDS,
    "RuleOutcome": words.RULE_OUTCOMES,
    "Saliency": words.SALIENCIES,
    "Score": words.SCORES,
}
# Reasons have a contract test of their own, states are set by the service.
ELSEWHERE = {"ErrorReason", "ModelState"}
# What the contract says an unset enum means; everywhere else zero is refused or never sent.
UNSET_MEANS = {
    "Encoding": jobs.Encoding.UINT8,
    "Fusion": jobs.Fusion.MEAN,
    "Lane": jobs.Lane.STANDARD,
    "LayerLayout": "",
    "MapSize": jobs.MapSize.LAYER,
    "Normalisation": jobs.Normalisation.NONE,
    "Polarity": jobs.Polarity.FOR,
    "Profile": jobs.Profile.PAPER,
    "Saliency": jobs.Saliency.COLOUR,
    "Score": jobs.Score.LOGIT,
}
OURS = (
    jobs.Compression,
    jobs.Encoding,
    jobs.Fusion,
    jobs.Lane,
    jobs.MapFlag,
    jobs.MapSize,
    jobs.Normalisation,
    jobs.OutputKind,
    jobs.PixelFormat,
    jobs.Polarity,
    jobs.Profile,
    jobs.RuleOutcome,
    jobs.Saliency,
    jobs.Score,
)


def request(*specs: spec_pb2.Spec, **fields: Any) -> explanation_service_pb2.ExplainRequest:
    """A request with an image, unless told."""
    if not {"image", "frame", "tensor"} & fields.keys():
        fields["image"] = input_pb2.EncodedImage(data=b"an image")
    return explanation_service_pb2.ExplainRequest(specs=specs, **fields)


def grad_cam(**fields: Any) -> spec_pb2.Spec:
    """A spec with its one required field."""
    return spec_pb2.Spec(**{"method": spec_pb2.METHOD_GRAD_CAM, **fields})


def read(message: explanation_service_pb2.ExplainRequest, deadline: float | None = None, **changes: Any) -> jobs.Job:
    """Reads a request that arrived at second 100."""
    return job_from_request(
        message, card(**changes), request_id="r-1", received_at=100.0, deadline=deadline, caller="someone"
    )


def read_spec(**fields: Any) -> jobs.Spec:
    """Reads one spec."""
    return read(request(grad_cam(**fields))).specs[0]


def refusal(message: explanation_service_pb2.ExplainRequest, **changes: Any) -> CamserveError:
    """What a request is refused with."""
    with pytest.raises(CamserveError) as caught:
        read(message, **changes)
    return caught.value


def test_every_enum_has_its_words():
    """An enum that is added to the contract needs a table, or a line here that says why not."""
    assert set(ENUMS) == TABLES.keys() | ELSEWHERE


@pytest.mark.parametrize("name", TABLES)
def test_every_value_of_an_enum_is_known_or_refused(name):
    """Every number has a word of ours; zero only where the contract gives it a meaning."""
    numbers = {value.number for value in ENUMS[name].values}
    expected = numbers - ({0} - ({0} if name in UNSET_MEANS else set()))

    assert expected == set(TABLES[name])
    assert UNSET_MEANS.get(name) == TABLES[name].get(0)


def test_every_word_of_ours_can_be_sent():
    """No value of our enums is without a number, and no method either."""
    for ours in OURS:
        assert set(ours) == set(TABLES[ours.__name__].values())
    assert METHODS.keys() <= set(words.METHODS.values())


def test_the_client_says_the_same_words():
    """It has its own tables, because it shares nothing with the server but the contract; what it prints can be asked for here."""
    tables = {
        "Method": client_words.METHODS, "Profile": client_words.PROFILES, "Fusion": client_words.FUSIONS,
        "Score": client_words.SCORES, "Polarity": client_words.POLARITIES, "Saliency": client_words.SALIENCIES,
        "MapSize": client_words.SIZES, "Encoding": client_words.ENCODINGS, "Normalisation": client_words.NORMALISATIONS,
        "RuleOutcome": client_words.RULE_OUTCOMES,
        "Lane": client_words.LANES, "MapFlag": client_words.FLAGS, "OutputKind": client_words.OUTPUT_KINDS,
        "ProgramKind": client_words.PROGRAM_KINDS,
    }  # fmt: skip
    for name, vocabulary in tables.items():
        for number, word in TABLES[name].items():
            assert number == 0 or str(word) == vocabulary.word(number)


def test_two_numbers_for_one_word_answer_with_the_one_said_aloud():
    """An answer never carries an unset enum where the contract has a value for it."""
    for table in TABLES.values():
        for word, number in words.inverse(table).items():
            assert word == table[number]
            assert number != 0 or word == ""


EVERY_FIELD = {
    "index": (request(grad_cam(), grad_cam()), 1, 1),
    "method": (request(grad_cam(method=spec_pb2.METHOD_LAYER_CAM)), 0, "layercam"),
    "layers": (request(grad_cam(layers=["stem", "body#0"])), 0, ("stem", "body#0")),
    "target": (
        request(grad_cam(target=spec_pb2.Target(class_index=2, score=spec_pb2.SCORE_SOFTMAX))),
        0,
        jobs.Target(about=jobs.ClassIndex(2), score=jobs.Score.SOFTMAX),
    ),
    "profile": (request(grad_cam(profile=spec_pb2.PROFILE_TORCHCAM)), 0, jobs.Profile.TORCHCAM),
    "fusion": (request(grad_cam(fusion=spec_pb2.FUSION_PRODUCT)), 0, jobs.Fusion.PRODUCT),
    "rectify": (request(grad_cam(rectify=False)), 0, False),
    "normalisation": (
        request(grad_cam(normalisation=spec_pb2.NORMALISATION_MIN_MAX)),
        0,
        jobs.Normalisation.MIN_MAX,
    ),
    "size": (request(grad_cam(size=spec_pb2.MAP_SIZE_INPUT)), 0, jobs.MapSize.INPUT),
    "encoding": (request(grad_cam(encoding=spec_pb2.ENCODING_PNG16)), 0, jobs.Encoding.PNG16),
    "overlay_opacity": (request(grad_cam(overlay_opacity=0.25)), 0, 0.25),
    "parameters": (
        request(
            grad_cam(
                parameters={
                    "channels": 1,
                    "samples": 2,
                    "steps": 3,
                    "seed": -4,
                    "allow_partial": True,
                    "noise": 0.5,
                    "window": 6,
                    "stride": 7,
                    "concepts": 8,
                    "similar_classes": 9,
                    "contrast": -0.25,
                }
            )
        ),
        0,
        jobs.Parameters(
            channels=1,
            samples=2,
            steps=3,
            seed=-4,
            allows_partial=True,
            noise=0.5,
            window=6,
            stride=7,
            concepts=8,
            similar_classes=9,
            contrast=-0.25,
        ),
    ),
    "smoothing": (
        request(grad_cam(smoothing={"augmentation": True, "eigen": True})),
        0,
        jobs.Smoothing(augmentation=True, eigen=True),
    ),
    "saliency": (request(grad_cam(saliency=spec_pb2.SALIENCY_GRAY)), 0, jobs.Saliency.GRAY),
    "regions": (
        request(grad_cam(regions={"threshold": 0.5, "max_regions": 3})),
        0,
        jobs.RegionOptions(threshold=0.5, max_regions=3),
    ),
}


# A property of the Open Inference Protocol rather than of a request: tests/unit/oip/test_reading.py has it.
NOT_ASKED_FOR = {"may_compress"}


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(jobs.Spec) if field.name not in NOT_ASKED_FOR]
)
def test_every_field_of_a_spec_can_be_asked_for(name):
    """A field that no request reaches would be dead."""
    message, index, expected = EVERY_FIELD[name]

    assert expected == getattr(read(message).specs[index], name)


def test_a_bare_spec_takes_the_defaults():
    """Only the method is required; the layer is the card's."""
    assert spec() == read_spec()


def test_a_method_that_reads_no_layers_gets_none():
    """The card's default is put in only where a method looks at layers; what the caller names is kept for validation to judge."""
    expected = {slug: ("body",) if method.reads is Reads.LAYERS else () for slug, method in METHODS.items()}

    numbers = words.inverse(words.METHODS)
    specs = [spec_pb2.Spec(method=numbers[slug]) for slug in METHODS]
    assert expected == {spec.method: spec.layers for spec in read(request(*specs)).specs}


@pytest.mark.parametrize(
    ("encoding", "size"),
    [
        (spec_pb2.ENCODING_OVERLAY_PNG, spec_pb2.MAP_SIZE_UNSPECIFIED),
        (spec_pb2.ENCODING_OVERLAY_WEBP, spec_pb2.MAP_SIZE_SOURCE),
    ],
)
def test_an_overlay_has_the_size_of_the_source(encoding, size):
    """Said aloud or not."""
    assert jobs.MapSize.SOURCE is read_spec(encoding=encoding, size=size).size


def test_inputs_are_read():
    """Image, frame and tensor, with the frame's stride as told or as its rows are."""
    frame = {"pixel_format": input_pb2.PIXEL_FORMAT_RGB8, "width_pixels": 5, "height_pixels": 2, "data": b"d"}
    tensor = {"data_type": input_pb2.DATA_TYPE_FLOAT16, "shape": [3, 2, 2], "data": b"d"}

    assert jobs.EncodedImage(data=b"an image") == read(request()).payload
    for given, stride in ((None, 15), (15, 15), (16, 16)):
        expected = jobs.RawFrame(pixel_format=jobs.PixelFormat.RGB8, width=5, height=2, stride=stride, data=b"d")
        assert expected == read(request(frame=input_pb2.RawFrame(**frame, stride_bytes=given))).payload
    expected = jobs.TensorInput(dtype="float16", shape=(3, 2, 2), data=b"d")
    assert expected == read(request(tensor=input_pb2.Tensor(**tensor))).payload


def test_the_rest_of_a_request_is_read():
    """Names come from the card, so that the version is never empty; the caller's labels are kept."""
    read_job = read(request(top_k=3, labels={"line": "7"}, version="", model="tiny"))

    assert ("r-1", "tiny", "1", 3, {"line": "7"}, 100.0, None, "someone") == (
        read_job.request_id,
        read_job.model,
        read_job.version,
        read_job.top_k,
        read_job.labels,
        read_job.received_at,
        read_job.deadline,
        read_job.caller,
    )


def test_the_prediction_lists_five_classes_unless_the_model_has_fewer():
    """The default fits every model; a detector of one class still lists five objects."""
    assert 4 == read(request()).top_k
    assert 5 == read(request(), class_count=6, labels=()).top_k
    assert 5 == read(request(), class_count=1, output_kind=jobs.OutputKind.DETECTION).top_k


def test_where_and_how_urgently_to_look_is_read():
    """The region of interest, the lane and the further inputs by name."""
    tensor = input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=[1], data=b"four")
    box = input_pb2.Box(left_pixels=1, top_pixels=0, width_pixels=3, height_pixels=4)

    plain, full = (
        read(request()),
        read(request(region_of_interest=box, lane="LANE_BULK", extra_inputs={"mask": tensor})),
    )

    assert (None, jobs.Lane.STANDARD, {}) == (plain.region_of_interest, plain.lane, plain.extra_inputs)
    assert (jobs.Box(1, 0, 3, 4), jobs.Lane.BULK) == (full.region_of_interest, full.lane)
    assert {"mask": jobs.TensorInput(dtype="float32", shape=(1,), data=b"four")} == full.extra_inputs


@pytest.mark.parametrize(
    ("own", "grpcs", "expected"),
    [(None, None, None), (None, 104.0, 104.0), (2.5, None, 102.5), (2.5, 104.0, 102.5), (9.0, 104.0, 104.0)],
)
def test_the_earlier_deadline_holds(own, grpcs, expected):
    """The request's own shortens gRPC's, never stretches it."""
    given = {}
    if own is not None:
        given["deadline"] = duration_pb2.Duration(seconds=int(own), nanos=int(own % 1 * 1e9))

    assert expected == read(request(**given), deadline=grpcs).deadline


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_deadline_that_is_over_is_refused(seconds):
    """On arrival already."""
    error = refusal(request(deadline=duration_pb2.Duration(seconds=seconds)))

    assert (DeadlineExceeded, "deadline") == (type(error), error.field)


BAD = {
    "no input": (explanation_service_pb2.ExplainRequest(), "input"),
    "no method": (request(spec_pb2.Spec()), "specs[0].method"),
    "unknown method": (request(grad_cam(), grad_cam(method=999)), "specs[1].method"),
    "unknown profile": (request(grad_cam(profile=99)), "specs[0].profile"),
    "unknown fusion": (request(grad_cam(fusion=99)), "specs[0].fusion"),
    "unknown normalisation": (request(grad_cam(normalisation=99)), "specs[0].normalisation"),
    "unknown size": (request(grad_cam(size=99)), "specs[0].size"),
    "unknown encoding": (request(grad_cam(encoding=99)), "specs[0].encoding"),
    "unknown score": (request(grad_cam(target={"score": 99})), "specs[0].target.score"),
    "small overlay": (
        request(grad_cam(encoding=spec_pb2.ENCODING_OVERLAY_PNG, size=spec_pb2.MAP_SIZE_LAYER)),
        "specs[0].size",
    ),
    "opacity above 1": (request(grad_cam(overlay_opacity=1.5)), "specs[0].overlay_opacity"),
    "opacity NaN": (request(grad_cam(overlay_opacity=math.nan)), "specs[0].overlay_opacity"),
    "no pixel format": (request(frame={"width_pixels": 1, "height_pixels": 1}), "frame.pixel_format"),
    "no width": (request(frame={"pixel_format": 1, "height_pixels": 1}), "frame.width_pixels"),
    "negative height": (
        request(frame={"pixel_format": 1, "width_pixels": 1, "height_pixels": -1}),
        "frame.height_pixels",
    ),
    "short stride": (
        request(frame={"pixel_format": 2, "width_pixels": 4, "height_pixels": 1, "stride_bytes": 7}),
        "frame.stride_bytes",
    ),
    "no data type": (request(tensor={"shape": [1]}), "tensor.data_type"),
    "no data type of a further input": (
        request(extra_inputs={"mask": input_pb2.Tensor(shape=[1])}),
        "extra_inputs[mask].data_type",
    ),
    "empty region of interest": (request(region_of_interest={"width_pixels": 1}), "region_of_interest.height_pixels"),
    "region of interest left of the source": (
        request(region_of_interest={"left_pixels": -1, "width_pixels": 1, "height_pixels": 1}),
        "region_of_interest.left_pixels",
    ),
    "region of interest above the source": (
        request(region_of_interest={"top_pixels": -1, "width_pixels": 1, "height_pixels": 1}),
        "region_of_interest.top_pixels",
    ),
    "unknown lane": (request(lane=99), "lane"),
    "unknown saliency": (request(grad_cam(saliency=99)), "specs[0].saliency"),
    "unknown polarity": (request(grad_cam(target={"polarity": 99})), "specs[0].target.polarity"),
    **{
        f"{name} of 0": (request(grad_cam(parameters={name: 0})), f"specs[0].parameters.{name}")
        for name in ("channels", "samples", "steps", "window", "stride", "concepts", "similar_classes")
    },
    "more masks than are drawn": (request(grad_cam(parameters={"samples": 10_001})), "specs[0].parameters.samples"),
    "more steps than are taken": (request(grad_cam(parameters={"steps": 1_001})), "specs[0].parameters.steps"),
    "negative noise": (request(grad_cam(parameters={"noise": -0.5})), "specs[0].parameters.noise"),
    "infinite noise": (request(grad_cam(parameters={"noise": math.inf})), "specs[0].parameters.noise"),
    "contrast NaN": (request(grad_cam(parameters={"contrast": math.nan})), "specs[0].parameters.contrast"),
    "no threshold": (request(grad_cam(regions={})), "specs[0].regions.threshold"),
    "threshold above 1": (request(grad_cam(regions={"threshold": 1.5})), "specs[0].regions.threshold"),
    "no regions": (
        request(grad_cam(regions={"threshold": 1.0, "max_regions": 0})),
        "specs[0].regions.max_regions",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_grammar_forbids_is_refused_at_its_field(name):
    """The path leads to the field at fault; nothing unknown is taken for a default."""
    message, field = BAD[name]

    error = refusal(message)

    assert (InvalidRequest, Reason.FIELD_INVALID, field) == (type(error), error.reason, error.field)
    assert error.message.startswith(field)


def test_a_method_that_is_not_built_is_refused():
    """Each of the contract's that the table lacks, with a list of those it has."""
    numbers = words.inverse(words.METHODS)
    for slug in set(words.METHODS.values()) - METHODS.keys():
        error = refusal(request(grad_cam(), spec_pb2.Spec(method=numbers[slug])))

        assert (Unsupported, Reason.METHOD_NOT_IMPLEMENTED, "specs[1].method", slug) == (
            type(error),
            error.reason,
            error.field,
            error.metadata["method"],
        )


@pytest.mark.parametrize("given", ["x" * 129, "tab\there", "größe", "\n"])
def test_a_request_id_that_would_spoil_the_log_is_refused(given):
    """At most 128 printable ASCII characters."""
    with pytest.raises(InvalidRequest) as caught:
        request_id_of(request(request_id=given))

    assert "request_id" == caught.value.field


def test_a_request_without_an_id_gets_one_of_its_own():
    """The caller's is kept; ours never repeats."""
    assert "mine 1" == request_id_of(request(request_id="mine 1"))
    assert request_id_of(request()) != request_id_of(request())


RULE_SPEC = jobs.Spec(index=0, method="grad-cam", layers=("body",))
RAW = jobs.RawMap(
    spec_index=1,
    target=jobs.ResolvedTarget(
        class_index=2,
        score=jobs.Score.SOFTMAX,
        value=0.75,
        rank=1,
        count=3,
        polarity=jobs.Polarity.AGAINST,
        other_class_index=1,
        step=4,
        cells=5,
        box=jobs.Box(1.5, 2.0, 3.0, 4.25),
        iou=0.625,
        concept=6,
        phrase="a crane",
    ),
    values=np.zeros((2, 3), np.float32),
    raw_min=-0.5,
    raw_max=1.5,
    flags=frozenset({jobs.MapFlag.PARTIAL, jobs.MapFlag.CONSTANT}),
    layers=("stem", "body"),
    completed=0.25,
)
HEATMAP = jobs.Heatmap(
    raw=RAW,
    label="crane",
    method="layercam",
    profile=jobs.Profile.TORCHCAM,
    shape=(2, 3),
    axes=("y", "x"),
    encoding=jobs.Encoding.PNG8,
    compression=jobs.Compression.ZLIB,
    payload=b"payload",
    value_min=0.25,
    value_max=1.25,
    geometry=jobs.Geometry(
        source_width=640,
        source_height=480,
        input_width=32,
        input_height=32,
        scale_x=20.0,
        scale_y=15.0,
        offset_x=9.5,
        offset_y=7.0,
    ),
    raw_sha256=b"r" * 32,
    payload_sha256=b"p" * 32,
    regions=(jobs.HeatRegion(box=jobs.Box(0.5, 1.00001, 2.0, 2.99997), peak=1.25, share=0.5),),
    rule="rejects",
)
SUMMARY = jobs.Summary(
    job=job(),
    model_sha256="c" * 64,
    facts=jobs.PassFacts(
        rows=3,
        explanations=5,
        device="cpu",
        dtype="float32",
        plan="tapped",
        forward_seconds=0.25,
        backward_seconds=0.5,
    ),
    decode_seconds=1.0,
    queue_seconds=2.0,
    map_seconds=3.0,
    encode_seconds=4.0,
    total_seconds=10.75,
    rules=(jobs.RuleVerdict(rule="rejects", outcome=jobs.RuleOutcome.NOT_SAMPLED),),
)
PREDICTION = jobs.Prediction(
    classes=(jobs.ClassScore(class_index=2, label="crane", logit=1.5, probability=0.5, step=3),),
    detections=(jobs.Detection(box=jobs.Box(0.25, 1.0, 2.0, 3.0), class_index=2, score=0.75, label="crane"),),
    embedding=(0.5, -0.25),
)


def pixels(left: int, top: int, width: int, height: int) -> input_pb2.Box:
    """A box as it is sent."""
    return input_pb2.Box(left_pixels=left, top_pixels=top, width_pixels=width, height_pixels=height)


def is_filled(message: Message) -> None:
    """Asserts that every field of a message, and of those inside it, is set: none was forgotten."""
    if isinstance(message, input_pb2.Box | spec_pb2.Spec):  # Whose zeros are places; whose fields a rule chooses.
        return
    assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field, _ in message.ListFields()}
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.full_name != "google.protobuf.Duration":
            for inner in value if isinstance(value, list) or hasattr(value, "add") else [value]:
                is_filled(inner)


def test_a_prediction_arrives_whole():
    """Every field of the message is filled from the event and the card."""
    answer = response(PREDICTION, card())

    assert "prediction" == answer.WhichOneof("event")
    is_filled(answer.prediction)
    (entry,) = answer.prediction.classes
    assert (2, "crane", 1.5, 0.5, 3) == (entry.class_index, entry.label, entry.logit, entry.probability, entry.step)
    (found,) = answer.prediction.detections
    # Outwards: from 0.25 to 2.25 are three columns.
    assert (pixels(0, 1, 3, 3), 2, "crane", 0.75) == (found.box, found.class_index, found.label, found.score)
    assert [0.5, -0.25] == list(answer.prediction.embedding)


def test_a_heatmap_arrives_whole():
    """Every field of the message is filled, and says in the wire's words what the event says in ours."""
    message = response(HEATMAP, card()).heatmap

    is_filled(message)
    assert (1, 1, 3) == (message.spec_index, message.target_index, message.target_count)
    target = message.target
    assert (2, "crane", spec_pb2.SCORE_SOFTMAX, 0.75) == (
        target.class_index,
        target.label,
        target.score,
        target.value,
    )
    assert (spec_pb2.POLARITY_AGAINST, 1, 4, 5, 0.625, 6, "a crane") == (
        target.polarity,
        target.other_class_index,
        target.step,
        target.cells,
        target.iou,
        target.concept,
        target.phrase,
    )
    expected = heatmap_pb2.Detection(box=pixels(1, 2, 4, 5), class_index=2, label="crane", score=0.75)
    assert expected == target.detection
    (region,) = message.regions
    # A hair beyond row 1 and before row 4 is rounding, not a row.
    assert (pixels(0, 1, 3, 3), 1.25, 0.5) == (region.box, region.peak, region.share)
    assert (0.25, "rejects") == (message.completed, message.rule)
    assert (HEATMAP.method, HEATMAP.profile) == (words.METHODS[message.method], words.PROFILES[message.profile])
    assert (HEATMAP.encoding, HEATMAP.compression) == (
        words.ENCODINGS[message.encoding],
        words.COMPRESSIONS[message.compression],
    )
    assert (["stem", "body"], [2, 3], ["y", "x"]) == (list(message.layers), list(message.shape), list(message.axes))
    assert (b"payload", 0.25, 1.25, -0.5, 1.5) == (
        message.payload,
        message.value_min,
        message.value_max,
        message.raw_min,
        message.raw_max,
    )
    assert [heatmap_pb2.MAP_FLAG_CONSTANT, heatmap_pb2.MAP_FLAG_PARTIAL] == list(message.flags)
    geometry = message.geometry
    assert (20.0, 9.5, 15.0, 7.0, 640, 480) == (
        geometry.scale_x,
        geometry.offset_x,
        geometry.scale_y,
        geometry.offset_y,
        geometry.source_width_pixels,
        geometry.source_height_pixels,
    )
    assert (b"r" * 32, b"p" * 32) == (message.raw_sha256, message.payload_sha256)


def test_a_tensor_has_no_geometry():
    """Unset, rather than an identity that nobody measured."""
    message = response(dataclasses.replace(HEATMAP, geometry=None), card()).heatmap

    assert not message.HasField("geometry")


def test_a_map_about_no_class_says_so():
    """Unset, rather than class 0; nor is anything else claimed that it is not about."""
    target = jobs.ResolvedTarget(class_index=None, score=jobs.Score.LOGIT, value=0.0)
    raw = dataclasses.replace(RAW, target=target, completed=1.0)

    message = response(dataclasses.replace(HEATMAP, raw=raw, label=""), card()).heatmap

    assert {"score", "polarity"} == {field.name for field, _ in message.target.ListFields()}
    assert 1.0 == message.completed


def test_a_summary_arrives_whole():
    """Every timing in its own field."""
    message = response(SUMMARY, card()).summary

    is_filled(message)
    timings = {field.name: value.ToTimedelta().total_seconds() for field, value in message.timings.ListFields()}
    assert {
        "decode": 1.0,
        "queue": 2.0,
        "forward": 0.25,
        "backward": 0.5,
        "maps": 3.0,
        "encode": 4.0,
        "total": 10.75,
    } == timings
    assert ("r-1", "tiny", "1", "c" * 64, 3, 5, "tapped", "cpu", "float32") == (
        message.request_id,
        message.model,
        message.version,
        message.model_sha256,
        message.batch_rows,
        message.pass_explanations,
        message.plan,
        message.device,
        message.dtype,
    )
    (verdict,) = message.rules
    assert ("rejects", heatmap_pb2.RULE_OUTCOME_NOT_SAMPLED) == (verdict.rule, verdict.outcome)


def test_a_failed_spec_carries_its_status():
    """With the spec's index, so that the caller knows which of them it was."""
    failed = jobs.SpecFailed(spec_index=2, error=ExecutionFailed(Reason.MODEL_FAILED, "no"), rule="rejects")

    message = response(failed, card()).spec_error

    is_filled(message)
    assert (2, code_pb2.INTERNAL, "no") == (message.spec_index, message.status.code, message.status.message)
    assert "rejects" == message.rule


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.999_999_999_9, 3.000_000_001, -1e-12])
def test_durations_are_valid(seconds):
    """Never negative, and nanoseconds below a second: a clock may step back by a hair."""
    duration = response(dataclasses.replace(SUMMARY, queue_seconds=seconds), card()).summary.timings.queue

    assert 0 <= duration.nanos < 1_000_000_000
    assert seconds == pytest.approx(duration.seconds + duration.nanos / 1e9, abs=1e-9)


def test_a_card_arrives_whole():
    """Every field of the message is filled from the card."""
    message = card_message(
        card(
            static_batch_rows=8,
            notes=("checked",),
            recipe=InputRecipe(shape=(3, 32, 32), mean=(0.5,), std=(0.25,)),
            layers=(
                LayerCard(name="body", shape=(16, 8, 8), layout="tokens", map_shape=(8, 8), refusal="for the test"),
            ),
            methods=(MethodCard(slug="grad-cam", works=True, note="for the test"),),
            output_kind=jobs.OutputKind.SEGMENTATION,
            rules=(
                RuleCard(name="rejects", when="score < 0.5", sample=0.25, asks={"method": "grad-cam"}, spec=RULE_SPEC),
            ),
            stages=("stem", "body"),
            phrases=("a crane",),
            extra_inputs=(ExtraInput(name="mask", shape=(1, 32, 32), dtype="float32"),),
            plan=PlanCard(form="folded", speedup=1.5, deviation=1e-6, threads=2, chunk_rows=4),
            memory_bytes=4096,
        )
    )

    is_filled(message)
    assert 4096 == message.memory_bytes
    assert ("tiny", "1", list(LABELS), 4, "body") == (
        message.name,
        message.version,
        list(message.labels),
        message.class_count,
        message.default_layer,
    )
    assert model_service_pb2.LAYER_LAYOUT_TOKENS == message.layers[0].layout
    assert (model_service_pb2.OUTPUT_KIND_SEGMENTATION, ["stem", "body"], ["a crane"]) == (
        message.output_kind,
        list(message.stages),
        list(message.phrases),
    )
    (extra,) = message.extra_inputs
    assert ("mask", [1, 32, 32], "float32") == (extra.name, list(extra.shape), extra.dtype)
    assert spec_pb2.METHOD_GRAD_CAM == message.methods[0].method
    assert ([3, 32, 32], "stretch", [0.5], [0.25], "rgb") == (
        list(message.input.shape),
        message.input.resize,
        list(message.input.mean),
        list(message.input.std),
        message.input.channels,
    )


def test_a_model_of_any_batch_size_has_no_static_one():
    """Unset, rather than zero rows."""
    assert not card_message(card()).HasField("static_batch_rows")

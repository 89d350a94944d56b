"""Targets: every kind the contract has is read, and what its grammar forbids is refused at its field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.cards import LABELS, card

from camserve.server import jobs
from camserve.server.errors import CamserveError, InvalidRequest, NotFound, Reason
from camserve.server.wire.targets import read_target
from camserve.v1 import input_pb2, spec_pb2

BOX = {"left_pixels": -1, "top_pixels": 2, "width_pixels": 3, "height_pixels": 4}
TENSOR = input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=[1], data=b"four")
TARGETS: list[tuple[dict[str, Any], jobs.Target]] = [
    ({}, jobs.Target()),
    ({"predicted": {}}, jobs.Target()),
    ({"class_index": 0}, jobs.Target(about=jobs.ClassIndex(0))),
    ({"class_label": "crane"}, jobs.Target(about=jobs.ClassIndex(2))),
    ({"kth": {"k": 2}}, jobs.Target(about=jobs.KthClass(2))),
    ({"top": {"k": 3}}, jobs.Target(about=jobs.TopClasses(3))),
    ({"above": {"probability": 0.5}}, jobs.Target(about=jobs.ClassesAbove(0.5))),
    ({"above": {}}, jobs.Target(about=jobs.ClassesAbove(0.0))),
    ({"region": {}}, jobs.Target(about=jobs.Region())),
    ({"region": {"class_index": 0, "box": BOX}}, jobs.Target(about=jobs.Region(0, jobs.Box(-1, 2, 3, 4)))),
    (
        {"region": {"mask": {"shape": [2, 3], "data": b"\0\0\0\0\7\0"}}},
        jobs.Target(about=jobs.Region(None, jobs.Mask((2, 3), b"\0\0\0\0\7\0"))),
    ),
    (
        {"region": {"point": {"x_pixels": 1.5, "y_pixels": 0}}},
        jobs.Target(about=jobs.Region(None, jobs.Point(1.5, 0.0))),
    ),
    ({"detection": {"box": BOX}}, jobs.Target(about=jobs.DetectionBox(jobs.Box(-1, 2, 3, 4)))),
    (
        {"detection": {"box": BOX, "class_index": 0, "min_iou": 0.25}},
        jobs.Target(about=jobs.DetectionBox(jobs.Box(-1, 2, 3, 4), 0, 0.25)),
    ),
    ({"difference": {"class_index": 1}}, jobs.Target(about=jobs.Difference(1, 0))),
    (
        {"difference": {"class_index": 1, "other_class_index": 2, "weight": 0}},
        jobs.Target(about=jobs.Difference(1, 2, 0.0)),
    ),
    ({"embedding": {"vector": {"values": [0, -1.5]}}}, jobs.Target(about=jobs.Embedding((0.0, -1.5)))),
    (
        {"embedding": {"image": {"data": b"an image"}}},
        jobs.Target(about=jobs.Reference(jobs.EncodedImage(data=b"an image"))),
    ),
    (
        {"embedding": {"tensor": TENSOR}},
        jobs.Target(about=jobs.Reference(jobs.TensorInput(dtype="float32", shape=(1,), data=b"four"))),
    ),
    ({"text": "a crane"}, jobs.Target(about=jobs.Phrase("a crane"))),
    ({"steps": {}}, jobs.Target(about=jobs.Steps())),
    ({"steps": {"first": 2, "count": 3}}, jobs.Target(about=jobs.Steps((), 2, 3))),
    ({"steps": {"class_indices": [3, 0], "count": 2}}, jobs.Target(about=jobs.Steps((3, 0), 0, 2))),
    ({"score": spec_pb2.SCORE_REST}, jobs.Target(score=jobs.Score.REST)),
    (
        {"predicted": {}, "score": spec_pb2.SCORE_SOFTMAX, "polarity": spec_pb2.POLARITY_AGAINST},
        jobs.Target(score=jobs.Score.SOFTMAX, polarity=jobs.Polarity.AGAINST),
    ),
    ({"output_path": "aux.logits"}, jobs.Target(output_path="aux.logits")),
]
BAD: dict[str, dict[str, Any]] = {
    "above.probability": {"above": {"probability": 1.5}},
    "region.box.width_pixels": {"region": {"box": {"height_pixels": 1}}},
    "region.mask.shape": {"region": {"mask": {"data": b"1"}}},
    "region.mask.shape[1]": {"region": {"mask": {"shape": [1, 0]}}},
    "region.mask.data": {"region": {"mask": {"shape": [2, 3], "data": b"12345"}}},
    "region.point.x_pixels": {"region": {"point": {"x_pixels": math.nan}}},
    "region.point.y_pixels": {"region": {"point": {"y_pixels": math.inf}}},
    "detection.box": {"detection": {"class_index": 1}},
    "detection.box.height_pixels": {"detection": {"box": {"width_pixels": 1}}},
    "detection.min_iou": {"detection": {"box": BOX, "min_iou": 0}},
    "difference.other_class_index": {"difference": {"class_index": 3, "other_class_index": 3}},
    "difference.weight": {"difference": {"class_index": 1, "weight": -math.inf}},
    "embedding": {"embedding": {}},
    "embedding.vector.values": {"embedding": {"vector": {"values": [0, 0]}}},
    "embedding.vector.values[1]": {"embedding": {"vector": {"values": [0, math.nan]}}},
    "embedding.tensor.data_type": {"embedding": {"tensor": {"shape": [1]}}},
    "steps.class_indices[1]": {"steps": {"class_indices": [0, -1]}},
    "steps.first": {"steps": {"first": -1}},
    "steps.count": {"steps": {"count": 0}},
    "score": {"score": 99},
    "polarity": {"polarity": 99},
}


def refusal(fields: dict[str, Any], **changes: Any) -> CamserveError:
    """What a target is refused with."""
    with pytest.raises(CamserveError) as caught:
        read_target(spec_pb2.Target(**fields), card(**changes), "target")
    return caught.value


@pytest.mark.parametrize(("fields", "expected"), TARGETS)
def test_targets_are_read(fields, expected):
    """Every kind, with what may be left out of it; zeros that were said aloud are kept."""
    assert expected == read_target(spec_pb2.Target(**fields), card(), "target")


def test_every_kind_of_the_contract_is_among_them():
    """A kind that is added to the contract needs its line above."""
    (kinds,) = spec_pb2.Target.DESCRIPTOR.oneofs[:1]

    assert {field.name for field in kinds.fields} <= {name for fields, _ in TARGETS for name in fields}


@pytest.mark.parametrize("name", BAD)
def test_what_the_grammar_forbids_is_refused_at_its_field(name):
    """The path leads to the field at fault."""
    error = refusal(BAD[name])

    assert (InvalidRequest, Reason.FIELD_INVALID, f"target.{name}") == (type(error), error.reason, error.field)
    assert error.message.startswith(f"target.{name}")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"region": {"mask": {"shape": [2, 1], "data": b"\0\0"}}}, "chooses no pixel"),
        ({"steps": {"class_indices": [1, 2], "count": 1}}, "2 classes are given"),
        ({"embedding": {"vector": {"values": []}}}, "a cosine needs a direction"),
        ({"embedding": {"vector": {"values": [1.0] * 65_537}}}, "at most 65536 numbers"),
    ],
)
def test_what_contradicts_itself_is_told(fields, told):
    """In words that say what would be right."""
    assert told in refusal(fields).message


def test_an_unknown_label_is_told_what_there_is():
    """The labels, or that there are none."""
    error = refusal({"class_label": "bus"})

    assert (NotFound, Reason.LABEL_NOT_FOUND, "target.class_label") == (type(error), error.reason, error.field)
    assert error.message.endswith(", ".join(LABELS))
    assert refusal({"class_label": "bus"}, labels=()).message.endswith("its card has no labels; use class_index")


def test_a_label_of_several_classes_is_refused():
    """ImageNet has a bird and a machine named crane: the first of them is not quietly taken."""
    error = refusal({"class_label": "crane"}, labels=("crane", "dog", "crane", "lorry"))

    assert (InvalidRequest, "target.class_label") == (type(error), error.field)
    assert "0, 2; use class_index" in error.message

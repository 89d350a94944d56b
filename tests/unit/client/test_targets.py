from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camserve.client import (
    Above,
    Box,
    DetectionBox,
    Difference,
    Embedding,
    InvalidInput,
    Kth,
    Phrase,
    Region,
    Similar,
    Spec,
    Steps,
    TensorInput,
    TopK,
)
from camserve.v1 import input_pb2, spec_pb2

BOX = input_pb2.Box(left_pixels=1, top_pixels=2, width_pixels=3, height_pixels=4)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, {"predicted": {}}),
        (3, {"class_index": 3}),
        ("scratch", {"class_label": "scratch"}),
        (Kth(2), {"kth": {"k": 2}}),
        (TopK(3), {"top": {"k": 3}}),
        (Above(0.5), {"above": {"probability": 0.5}}),
        (Difference(1, 0), {"difference": {"class_index": 1, "other_class_index": 0}}),
        (Difference(1, 0, 0.0), {"difference": {"class_index": 1, "weight": 0.0}}),
        (Region(), {"region": {}}),
        (Region(box=Box(1, 2, 3, 4), class_index=0), {"region": {"class_index": 0, "box": BOX}}),
        (Region(point=(1.5, 0)), {"region": {"point": {"x_pixels": 1.5}}}),
        (
            Region(mask=np.array([[0, 0.5, 0], [0, 0, -1]])),
            {"region": {"mask": {"shape": [2, 3], "data": b"\0\1\0\0\0\1"}}},
        ),
        (DetectionBox(Box(1, 2, 3, 4)), {"detection": {"box": BOX}}),
        (DetectionBox(Box(1, 2, 3, 4), 0, 0.25), {"detection": {"box": BOX, "class_index": 0, "min_iou": 0.25}}),
        (Embedding(np.array([0.5, 1.0])), {"embedding": {"vector": {"values": [0.5, 1.0]}}}),
        (Similar(b"a file"), {"embedding": {"image": {"data": b"a file"}}}),
        (Phrase("a scratch"), {"text": "a scratch"}),
        (Steps(), {"steps": {}}),
        (Steps(classes=[3, 0], first=2, count=2), {"steps": {"class_indices": [3, 0], "first": 2, "count": 2}}),
    ],
)
def test_targets_take_the_form_their_type_says(target: object, expected: dict[str, object]) -> None:
    """None, an index, a label and the wrappers each have one meaning."""
    expected_target = spec_pb2.Target(**expected)
    # An empty message in a oneof is a choice of its own.
    (kind,) = expected
    if expected[kind] == {}:
        getattr(expected_target, kind).SetInParent()

    assert expected_target == Spec("cam", target=target).to_proto().target  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [True, 1.5, [1]])
def test_targets_of_other_types_are_refused(target: object) -> None:
    """True is an int to Python, but nobody means class 1 by it."""
    with pytest.raises(TypeError, match="class index"):
        Spec("cam", target=target)  # type: ignore[arg-type]


def test_a_region_is_chosen_in_one_way() -> None:
    """Two would contradict each other."""
    with pytest.raises(ValueError, match="one of box, mask and point, not box and point"):
        Region(box=Box(1, 2, 3, 4), point=(1, 2))


def test_any_input_can_be_compared_with(tmp_path: Path) -> None:
    """Arrays go as lossless files, because the contract takes no frames here; what cannot be read is told at once."""
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)

    sent = Similar(pixels).to_proto().embedding.image.data
    assert pixels.tolist() == np.asarray(Image.open(io.BytesIO(sent))).tolist()
    tensor = Similar(TensorInput(np.ones(1, np.float32))).to_proto().embedding.tensor
    assert (input_pb2.DATA_TYPE_FLOAT32, [1]) == (tensor.data_type, list(tensor.shape))
    with pytest.raises(InvalidInput, match="cannot read"):
        Similar(tmp_path / "missing.png")

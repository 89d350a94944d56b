"""Models that do not classify, through a real server: what each says, and what can be asked of it in places on the source."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from support.kinds import sources_of_kinds
from support.servers import settings

from camserve.client import (
    Box,
    Client,
    DetectionBox,
    Embedding,
    FailedPrecondition,
    InvalidRequest,
    Region,
    Similar,
    Spec,
    Steps,
    TensorInput,
    TopK,
)
from camserve.server.background import BackgroundServer


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Iterator[Client]:
    """A client of a server with one model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    with BackgroundServer(settings(), sources_of_kinds(folder)) as server, Client(server.target) as client:
        yield client


@pytest.fixture
def picture() -> Image.Image:
    """64 wide and 32 high, so that a quarter of the input above and below is padding; the left half is brighter."""
    pixels = np.full((32, 64, 3), 80, np.uint8)
    pixels[:, :32] = 200
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["segmentation", "embedding", "sequence", "detection"])
def test_cards_tell_what_a_model_returns(kinds, kind):
    """So that a caller knows what to ask."""
    assert kind == kinds.model(kind).output_kind


def test_a_region_of_a_segmentation_is_named_on_the_source(kinds, picture):
    """A box of 8 x 8 source pixels is four input pixels a side and two cells: four cells; a point is one."""
    result = kinds.explain(
        picture,
        model="segmentation",
        specs=[
            Spec("vanilla-backprop", target=Region(box=Box(8, 8, 8, 8), class_index=0), encoding="float32"),
            Spec("vanilla-backprop", target=Region(point=(60.0, 16.0)), encoding="float32"),
        ],
    )
    result.raise_for_errors()

    box, point = result.heatmaps
    assert (0, 4) == (box.target.class_index, box.target.cells)
    assert (1, 1) == (point.target.class_index, point.target.cells)
    rows, columns = np.nonzero(box.strength)
    # Input pixels 4 to 7 across; down they lie 8 further below, for the padding.
    assert (12, 15, 4, 7) == (rows.min(), rows.max(), columns.min(), columns.max())


def test_a_region_that_the_model_did_not_see_is_refused(kinds, picture):
    """With what it saw."""
    for options in ({}, {"region_of_interest": Box(0, 0, 32, 32)}):
        with pytest.raises(InvalidRequest, match="lies outside of what the model saw"):
            kinds.explain(
                picture,
                model="segmentation",
                specs=[Spec("grad-cam", target=Region(box=Box(64 if not options else 40, 0, 8, 8)))],
                **options,
            )


def test_a_detection_is_matched_and_told_on_the_source(kinds, picture):
    """The left half of the input is that of the source, from its first row to its last: padding is cut off."""
    result = kinds.explain(
        picture,
        model="detection",
        specs=[
            Spec("vanilla-backprop", target=DetectionBox(Box(34, 0, 30, 32), min_iou=0.4)),
            Spec("vanilla-backprop", target=TopK(2)),
        ],
    )
    result.raise_for_errors()

    assert [(1, Box(0, 0, 32, 32)), (2, Box(32, 0, 32, 32))] == [
        (found.class_index, found.box) for found in result.prediction.detections
    ]
    matched, first, second = result.heatmaps
    assert result.prediction.detections[1].box == matched.target.detection.box
    assert 0.4 < matched.target.iou < 1
    assert [1, 2] == [first.target.class_index, second.target.class_index]


def test_embeddings_are_compared(kinds, picture):
    """An image is most similar to itself; a vector is compared as well."""
    said = kinds.explain(picture, model="embedding").prediction
    result = kinds.explain(
        picture,
        model="embedding",
        specs=[Spec("grad-cam", target=Similar(picture)), Spec("grad-cam", target=Embedding(said.embedding))],
    )
    result.raise_for_errors()

    assert 6 == len(said.embedding)
    assert [1.0, 1.0] == pytest.approx([item.target.value for item in result.heatmaps])
    assert {None} == {item.target.class_index for item in result.heatmaps}
    with pytest.raises(FailedPrecondition, match="it has: embedding, text"):
        kinds.explain(picture, model="embedding", specs=["grad-cam"])
    with pytest.raises(InvalidRequest, match="has 2 numbers; embeddings of model 'embedding' have 6"):
        kinds.explain(picture, model="embedding", specs=[Spec("grad-cam", target=Embedding([1.0, 2.0]))])


def test_the_steps_of_a_sequence_get_a_map_each(kinds, picture):
    """Those asked about, each with the class predicted there, or the one that was given."""
    result = kinds.explain(
        picture,
        model="sequence",
        specs=[Spec("grad-cam", target=Steps(first=2, count=3)), Spec("grad-cam", target=Steps(classes=[3, 0]))],
    )
    result.raise_for_errors()

    said = [item.class_index for item in result.prediction.classes]
    assert list(range(16)) == [item.step for item in result.prediction.classes]
    assert [(2, said[2]), (3, said[3]), (4, said[4]), (0, 3), (1, 0)] == [
        (item.target.step, item.target.class_index) for item in result.heatmaps
    ]


def test_further_inputs_reach_the_model(kinds, picture):
    """Nothing is left where the mask chooses nothing; without it the request is refused."""
    chosen = [
        kinds.explain(picture, model="gated", extra_inputs={"mask": TensorInput(mask)}).prediction.classes[0].logit
        for mask in (np.ones((1, 16, 16), np.float32), np.zeros((1, 16, 16), np.float32))
    ]

    assert chosen[0] > 0
    assert 0.0 == chosen[1]
    with pytest.raises(InvalidRequest, match=r"takes mask \(float32 \(1, 16, 16\)\); sent: none"):
        kinds.explain(picture, model="gated")
    with pytest.raises(InvalidRequest, match="takes mask"):
        kinds.explain(picture, model="gated", extra_inputs={"mask": TensorInput(np.ones((1, 8, 8), np.float32))})

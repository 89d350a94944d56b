from __future__ import annotations

import base64
import html.parser
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from camserve.client import Client, Result, Spec, TensorInput, TopK
from camserve.client.errors import Unavailable
from camserve.client.report import ReportEntry, write_report
from camserve.v1 import explanation_service_pb2, heatmap_pb2
from tests.unit.client.conftest import Peer, heatmap, summary


class _Page(html.parser.HTMLParser):
    """Reads what a browser would show.

    Attributes:
        text: all text.
        sources: of the images.
        open_tags: those not closed yet.
        mismatched: end tags that closed nothing.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.sources = "", list[str]()
        self.open_tags, self.mismatched = list[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.sources.append(dict(attrs)["src"] or "")
        if tag not in {"img", "meta", "br"}:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open_tags or self.open_tags.pop() != tag:
            self.mismatched.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_tells_everything_in_one_file(peer: Peer, client: Client, png: bytes, tmp_path: Path) -> None:
    """Prediction, maps, failures and times; well-formed, with nothing to load from elsewhere."""
    result = client.explain(
        png, model="surface", specs=["grad-cam", Spec("cam", layers=["flat"]), Spec("layercam", target=TopK(2))]
    )
    entries = [
        ReportEntry(name="<part>.png", result=result, facts={"truth": "scratch"}),
        ReportEntry(name="gone.png", result=Unavailable("UNAVAILABLE", "DRAINING", "the server is draining")),
    ]

    path = write_report(tmp_path / "new" / "report.html", entries, title="Parts & why", server_facts={"server": "here"})

    written = path.read_text("utf-8")
    page = _Page(written)
    assert ([], []) == (page.open_tags, page.mismatched)
    for told in (
        "Parts & why", "<part>.png", "scratch 75.0%", "truth", "grad-cam", "layercam", "2 of 2", "layer2", "0 to 4",
        "LAYER_UNUSABLE", "12.0 ms", "the server is draining", "2 images, 3 maps",
    ):  # fmt: skip
        assert told in page.text
    assert 4 == len(page.sources)
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,")))).verify()
    assert not re.search(r"https?://|url\(|@import|<script|<link", written)


def test_maps_of_a_tensor_need_a_picture_and_say_so(peer: Peer, client: Client, tmp_path: Path) -> None:
    """With a picture of the entry's own they are shown; without one the rest still is."""
    result = client.explain(TensorInput(np.zeros((3, 4, 4), np.float32)), model="surface", specs=["grad-cam"])
    entries = [
        ReportEntry(name="without", result=result),
        ReportEntry(name="with", result=result, picture=Image.new("RGB", (8, 8))),
    ]

    page = _Page(write_report(tmp_path / "report.html", entries, title="t", server_facts={}).read_text("utf-8"))

    assert 1 == page.text.count("there is no picture to lay the map over")
    assert 2 == len(page.sources)


def _explained(peer: Peer, client: Client, png: bytes, said: heatmap_pb2.Prediction, *maps: Any) -> Result:
    def answer(
        request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        yield explanation_service_pb2.ExplainResponse(prediction=said)
        yield from maps
        yield summary(request)

    peer.answer = answer
    return client.explain(png, model="surface", specs=["cam"] * len(maps))


def _written(result: Result, tmp_path: Path) -> str:
    path = write_report(tmp_path / "report.html", [ReportEntry(name="n", result=result)], title="t", server_facts={})
    return path.read_text("utf-8")


def test_every_form_of_map_is_shown(peer: Peer, client: Client, png: bytes, tmp_path: Path) -> None:
    """Signed channels in colour, a signal as a curve, a volume from the front; details, regions and partial work are told."""
    box = {"left_pixels": 1, "top_pixels": 1, "width_pixels": 3, "height_pixels": 2}
    regions = [heatmap_pb2.HeatRegion(box=box, peak=1, share=0.5 / (place + 1)) for place in range(5)]
    target = {"class_index": 1, "polarity": "POLARITY_AGAINST", "other_class_index": 0}
    result = _explained(
        peer, client, png, heatmap_pb2.Prediction(classes=[{"class_index": 1, "probability": 0.5}]),
        heatmap(np.ones((2, 2, 3), np.float32), axes=["h", "w", "c"], spec_index=0),
        heatmap(np.array([-1, 0, 1], np.float32), None, axes=["t"], spec_index=1),
        heatmap(np.ones((2, 3, 4), np.float32), None, axes=["d", "h", "w"], spec_index=2),
        heatmap(
            source=(6, 4), spec_index=3, regions=regions, target=target, flags=["MAP_FLAG_PARTIAL"], completed=0.25
        ),
    )  # fmt: skip

    written = _written(result, tmp_path)

    page = _Page(written)
    assert ([], []) == (page.open_tags, page.mismatched)
    assert 4 == len(page.sources)
    assert '<polyline points="0.0,120.0 150.0,60.0 300.0,0.0">' in written
    for told in ("against scratch rather than 0", "partial", "25% done", "50% in 3 x 2 at 1, 1", "and 2 more regions"):
        assert told in page.text


def test_boxes_of_regions_are_drawn(peer: Peer, client: Client, png: bytes, tmp_path: Path) -> None:
    """The picture with them is another than the one without."""
    region = heatmap_pb2.HeatRegion(box={"width_pixels": 6, "height_pixels": 4}, peak=1, share=1)
    said = heatmap_pb2.Prediction(classes=[{"class_index": 1}])

    result = _explained(
        peer, client, png, said, heatmap(source=(6, 4)), heatmap(source=(6, 4), regions=[region], spec_index=1)
    )

    _, plain, outlined = _Page(_written(result, tmp_path)).sources
    assert plain != outlined


BOX = {"left_pixels": 1, "top_pixels": 2, "width_pixels": 3, "height_pixels": 4}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"classes": [{"class_index": 0, "label": "age", "logit": 41.5}]}, ["age 41.5"]),
        ({"classes": [{"label": "h", "step": 0}, {"label": "i", "step": 1}]}, ["h i", "1: h", "2: i"]),
        (
            {"detections": [{"box": BOX, "label": "cat", "score": 0.5}, {"box": BOX, "label": "dog", "score": 0.25}]},
            ["cat 50.0% and 1 more", "3 x 4 at 1, 2", "25.0%"],
        ),
        ({"embedding": [3.0, 4.0]}, ["2 dimensions", "length5"]),
        ({}, ["nothing found"]),
    ],
)
def test_every_kind_of_prediction_is_told(
    peer: Peer, client: Client, png: bytes, tmp_path: Path, said: dict[str, Any], told: list[str]
) -> None:
    """Values without a probability, steps, objects, vectors, nothing."""
    page = _Page(_written(_explained(peer, client, png, heatmap_pb2.Prediction(**said)), tmp_path))

    assert ([], []) == (page.open_tags, page.mismatched)
    for words in told:
        assert words in page.text

from __future__ import annotations

import base64
import html.parser
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from camserve.client import Client, Spec, TensorInput, TopK
from camserve.client.errors import Unavailable
from camserve.client.report import ReportEntry, write_report
from tests.unit.client.conftest import Peer


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

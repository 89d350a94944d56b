from __future__ import annotations

import dataclasses
import datetime as dt
import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from camserve.client import Client, Spec
from camserve.client.bench import Closed, Failure, Load, Open, Step, figures_of
from camserve.client.bench.document import SCHEMA_VERSION, Run, document
from camserve.client.bench.kinds import KindOfRequest
from camserve.client.bench.page import page, write_page
from camserve.client.bench.sweep import LoadResult, Ratio
from camserve.client.bench.tables import grids, notes
from tests.unit.client.bench.test_figures import record

DOCS = Path(__file__).parents[4] / "docs/bench.md"
VOID = {"meta", "br", "img"}


def result(load: Load, latency: float, **changes: object) -> LoadResult:
    """A load under which 50 requests of two kinds were answered, one failed and one lacked a spec."""
    records = [
        record(index / 10, latency=latency + index / 5000, kind=index % 2, batch_rows=1 + index % 4)
        for index in range(50)
    ]
    records.append(record(5.0, code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL"))
    records.append(record(6.0, spec_errors=(Failure("FAILED_PRECONDITION", "LAYER_UNUSABLE"),)))
    step = Step(load=load, seconds=10.0, records=records, loop_seconds=1.0, wall_seconds=10.0)
    return LoadResult(mix=figures_of(step, target_seconds=0.25), **changes)


@pytest.fixture
def run(client: Client) -> Run:
    """A sweep of three loads."""
    return Run(
        started=dt.datetime(2026, 1, 2, 3, 4, tzinfo=dt.UTC),
        server="here:50051",
        card=client.model("surface"),
        kinds=[
            KindOfRequest(name="grad-cam", weight=3.0, specs=(Spec("grad-cam"),)),
            KindOfRequest(name="eigen-cam", weight=1.0, specs=(Spec("eigen-cam", layers=["layer2"]),)),
        ],
        source="2 image files",
        source_count=2,
        source_bytes=1234.5,
        settings={"seed": 0, "methods": ("grad-cam=3", "eigen-cam=1"), "deadline": None, "images": ["a.png"]},
        target_seconds=0.25,
        results=[result(Closed(callers), 0.1 * callers) for callers in (1, 2, 4)],
        is_complete=True,
    )


class _Checker(html.parser.HTMLParser):
    """Follows opening and closing tags, and notes whatever would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [f"{tag} {name}" for name, _ in attrs if name in {"src", "href", "srcset", "data", "xlink:href"}]
        if tag in {"script", "link", "iframe", "object", "embed"}:
            self.loaded.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert tag == self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


def checked(text: str) -> str:
    """The page, well-formed and self-contained."""
    checker = _Checker()
    checker.feed(text)
    checker.close()
    assert ([], []) == (checker.open, checker.loaded)
    assert not re.search(r"@import|url\(|https?://", text)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)  # noqa: S314 - our own text
    return text


def test_page_is_well_formed_and_loads_nothing(run: Run, tmp_path: Path) -> None:
    """One file with six plots that opens anywhere."""
    write_page(tmp_path / "run.html", run)

    text = checked((tmp_path / "run.html").read_text("utf-8"))
    assert 6 == text.count("<svg")
    for title in ("Latency", "Throughput", "Distribution of latency", "Where the time goes", "Batch size"):
        assert f"<b>{title}</b>" in text


@pytest.mark.parametrize("load", [Closed(3), Open(2.5)])
def test_page_of_one_load(run: Run, load: Load) -> None:
    """A single value, of either loop, has its plots too."""
    run.results = [result(load, 0.2)]

    assert 6 == checked(page(run)).count("<svg")


def test_page_of_a_comparison_tells_what_explaining_costs(run: Run) -> None:
    """The ratio stands among the first figures, and predictions beside the mix."""
    ratio = Ratio(median=1.25, low=1.1, high=1.5)
    bare = result(Closed(4), 0.1).mix
    run.results = [result(Closed(4), 0.2, prediction=bare, time_ratio=ratio, latency_ratio=ratio)]

    text = checked(page(run))

    assert "the cost of a bare prediction, at 4 callers" in text
    (told,) = notes(run)
    assert "4 callers: an answer of the mix costs 1.25 x (1.10 to 1.50) a bare prediction" in told
    assert "4 callers, predictions" in text


def test_page_of_nothing(run: Run) -> None:
    """A run that was stopped at once, and one in which all failed, still give a page."""
    run.results, run.is_complete = [], False
    assert "Stopped before the end" in checked(page(run))

    failed = Step(
        load=Closed(1), seconds=1.0, records=[record(0.1, code="UNAVAILABLE")], loop_seconds=0.0, wall_seconds=1.0
    )
    run.results = [LoadResult(mix=figures_of(failed))]
    assert 1 == checked(page(run)).count("<svg")


def test_page_escapes_what_comes_from_outside(run: Run) -> None:
    """A model's name is text, and so is whatever was typed."""
    evil = "<script>alert(1)</script>"
    run.card = dataclasses.replace(run.card, name=evil, device=evil)
    run.source = run.server = evil
    run.settings = {evil: evil}
    run.missed = [evil]

    assert "&lt;script&gt;" in checked(page(run))


def test_tables_hold_what_the_plots_show(run: Run) -> None:
    """Loads, stages, kinds and failures, the last by code and reason."""
    found = {grid.title: grid for grid in grids(run)}

    assert ["Throughput and latency", "Mean time by stage, ms", "Latency by kind of request", "What failed"] == list(
        found
    )
    for grid in found.values():
        assert {len(grid.headings)} == {len(row) for row in grid.rows}
    assert ("1 caller", "RESOURCE_EXHAUSTED QUEUE_FULL", "1", "1.9%") in found["What failed"].rows
    assert ("1 caller", "spec: FAILED_PRECONDITION LAYER_UNUSABLE", "1", "1.9%") in found["What failed"].rows


def test_document_is_json_with_its_version(run: Run) -> None:
    """It reads back as it was, with the figures of every load."""
    written = json.loads(json.dumps(document(run), allow_nan=False))

    assert ("camserve-bench", SCHEMA_VERSION, 1) == (written["schema"], written["schema_version"], SCHEMA_VERSION)
    assert ("surface", "2", "ab" * 32) == tuple(written["model"][key] for key in ("name", "version", "sha256"))
    assert [1, 2, 4] == [step["load"]["concurrency"] for step in written["steps"]]
    first = written["steps"][0]
    assert [{"code": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL", "count": 1}] == first["errors"]
    assert first["answered"] == sum(bucket["count"] for bucket in first["latency_histogram"])
    assert {"grad-cam", "eigen-cam"} == set(first["latency_by_kind_seconds"])
    assert "2026-01-02T03:04:00+00:00" == written["started"]


def test_every_key_of_the_document_is_told(run: Run) -> None:
    """docs/bench.md has each key that a reader may meet, and no other."""
    ratio = Ratio(median=1.0, low=1.0, high=1.0)
    bare = dataclasses.replace(result(Closed(1), 0.1).mix, by_kind={})
    run.results = [
        result(Closed(1), 0.1, prediction=bare, time_ratio=ratio, latency_ratio=ratio),
        result(Open(1.0), 0.1),
    ]
    by_name = {"latency_by_kind_seconds", "batch_rows_counts", "settings"}  # Their own keys are names and numbers.

    def keys(value: object) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        if not isinstance(value, dict):
            return set()
        return set(value).union(*(keys(inner) for key, inner in value.items() if key not in by_name))

    section = DOCS.read_text("utf-8").partition("\n## The JSON\n")[2]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    told = re.findall(r"`(\w+)`", " ".join(cells))
    assert keys(document(run)) == set(told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"is_growing": True}, "cannot keep up"),
        ({"loop_share": 0.95}, "busy 95% of the time"),
        ({"not_sent": 3}, "3 requests were not sent"),
        ({"partial_maps": 2}, "2 maps were unfinished"),
        ({"lag": "late"}, "this machine has other work"),
    ],
)
def test_doubts_are_told(run: Run, changes: dict[str, object], told: str) -> None:
    """Whatever makes the figures doubtful stands beneath them."""
    figures = run.results[0].mix
    if "lag" in changes:
        changes = {"lag": figures.latency}
    run.results = [LoadResult(mix=dataclasses.replace(figures, **changes))]

    assert any(told in line for line in notes(run))

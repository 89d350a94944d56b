from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.client.bench import charts
from camserve.client.bench.charts import Series, Spread

# From a microsecond to ten days, and nothing at all.
MEASURED = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
VALUES = st.lists(st.one_of(st.none(), MEASURED), min_size=1, max_size=8).filter(
    lambda values: any(value is not None for value in values)
)


def _told(value: float) -> str:
    return f"{value:.3g}"


def _parsed(svg: str) -> ET.Element:
    """The plot as XML; it must be well-formed, and every coordinate a number inside the plot."""
    root = ET.fromstring(svg)  # noqa: S314 - our own text
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        for name, limit in (("x", width), ("cx", width), ("x1", width), ("x2", width), ("y", height), ("cy", height)):
            if name in element.attrib:
                assert -1 <= float(element.attrib[name]) <= limit + 1, (element.tag, element.attrib)
    return root


@given(VALUES)
def test_lines_stay_inside_whatever_the_values(values: Sequence[float | None]) -> None:
    """A dot for each value, and none for a gap."""
    places = [str(index) for index in range(len(values))]

    root = _parsed(charts.lines("a", places, [Series(name="p50", style="p50", values=values)], "callers", _told))

    dots = root.findall("circle")
    assert len(dots) == sum(value is not None for value in values)


def test_a_larger_value_lies_higher() -> None:
    """On a linear axis half as much lies half as high."""
    root = _parsed(charts.lines("a", ["1", "2"], [Series(name="x", style="p50", values=[5.0, 10.0])], "load", _told))

    first, second = (float(dot.attrib["cy"]) for dot in root.findall("circle"))
    zero = next(float(text.attrib["y"]) - 4 for text in root.findall("text") if text.text == "0")
    assert 2 * (zero - first) == pytest.approx(zero - second, abs=0.3)


@given(st.lists(st.lists(MEASURED, min_size=3, max_size=3), min_size=1, max_size=12), st.booleans())
def test_stacked_parts_join(columns: list[list[float]], as_shares) -> None:
    """Each part of a bar begins where the one before it ends."""
    series = [Series(name=str(part), style="p50", values=[row[part] for row in columns]) for part in range(3)]

    root = _parsed(charts.bars("a", [str(index) for index in range(len(columns))], series, _told, as_shares=as_shares))

    parts = root.findall("rect")
    assert 3 * len(columns) == len(parts)
    for before, after in itertools.pairwise(parts):
        if before.attrib["y"] == after.attrib["y"]:
            end = float(before.attrib["x"]) + float(before.attrib["width"])
            assert end == pytest.approx(float(after.attrib["x"]), abs=0.02)


def test_shares_make_bars_as_long_as_each_other() -> None:
    """A half is as long in a bar of 2 as in one of 2 000; the totals are told."""
    halves = [Series(name=name, style="p50", values=[1.0, 1000.0]) for name in ("a", "b")]

    root = _parsed(charts.bars("a", ["x", "y"], halves, _told, as_shares=True))

    assert 1 == len({part.attrib["width"] for part in root.findall("rect")})
    assert ["2", "2e+03"] == [text.text for text in root.findall("text") if text.attrib["class"] == "value"]


def test_dots_are_as_large_as_their_share() -> None:
    """A number that every answer had is the largest dot; means are joined by a line."""
    root = _parsed(charts.dots("a", ["1", "8"], [{1: 10}, {4: 1, 8: 9}], "callers"))

    radii = [float(dot.attrib["r"]) for dot in root.findall("circle")]
    assert radii[0] > radii[2] > radii[1]
    (line,) = root.findall("polyline")
    assert 2 == len(line.attrib["points"].split())


def test_distributions_take_rows_without_values() -> None:
    """A load under which nothing was answered keeps its row."""
    rows = [
        Spread(name="1", bars=[(0.1, 0.2, 3), (0.2, 0.4, 1)], marks=[(0.2, "p50")]),
        Spread(name="2", bars=[], marks=[]),
    ]

    root = _parsed(charts.distributions("a", rows, _told))

    assert 2 == len(root.findall("path"))
    assert ["1, p50: 0.2"] == [
        mark.findtext("title") for mark in root.findall("line") if "mark" in mark.attrib["class"]
    ]


def test_what_comes_from_outside_is_escaped() -> None:
    """Names are text, never markup."""
    evil = '<script>"&'

    for svg in (
        charts.lines(evil, [evil], [Series(name=evil, style="p50", values=[1.0])], evil, _told),
        charts.bars(evil, [evil], [Series(name=evil, style="p50", values=[1.0])], _told),
        charts.dots(evil, [evil], [{1: 1}], evil),
        charts.distributions(evil, [Spread(name=evil, bars=[(1.0, 2.0, 1)], marks=[])], _told),
    ):
        _parsed(svg)
        assert "<script" not in svg
    assert "<script" not in charts.legend([("p50", evil)])


def test_every_plot_has_a_title() -> None:
    """For those who cannot see it."""
    svg = charts.lines("Latency against load", ["1"], [Series(name="x", style="p50", values=[1.0])], "callers", _told)

    assert re.match(r'<svg [^>]*role="img" aria-label="Latency against load">', svg)
    assert "Latency against load" == _parsed(svg).findtext("title")

"""Plots as inline SVG: lines over loads, stacked bars, dots by size, distributions. Pure functions from numbers to text.

`page.py` puts them on a page whose style sheet, `page.css`, gives the colours, so that they follow light and dark. Each is an
image with a title for those who cannot see it; the tables beneath hold the same numbers.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

WIDTH: Final = 560
_HEIGHT: Final = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 14, 46
_LETTER: Final = 6.3
# From here on, the largest value hides the smallest on a linear axis.
_WIDE_RANGE: Final = 25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line, or one part of each bar.

    Attributes:
        name: for the legend.
        style: CSS class that colours it.
        values: one for each place on the axis; None leaves a gap.
    """

    name: str
    style: str
    values: Sequence[float | None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One row of a distribution.

    Attributes:
        name: of the row.
        bars: lower edge, upper edge and height of each, the edges above 0.
        marks: values to mark, with their names.
    """

    name: str
    bars: Sequence[tuple[float, float, float]]
    marks: Sequence[tuple[float, str]]


def lines(title: str, places: Sequence[str], series: Sequence[Series], axis: str, told: Callable[[float], str]) -> str:
    """Returns lines over places that stand at equal distances.

    Args:
        title: what the plot tells, for those who cannot see it.
        places: names on the horizontal axis.
        series: at least one value in all.
        axis: name of the horizontal axis.
        told: a value as text.
    """
    values = [value for line in series for value in line.values if value is not None]
    scale = _Scale.of(values, _HEIGHT - _BOTTOM, _TOP)
    across = _places(len(places))
    parts = [_grid(scale, told)]
    for place, name in zip(across, places, strict=True):
        parts.append(_text(place, _HEIGHT - _BOTTOM + 18, name, "middle"))
    parts.append(_text((WIDTH + _LEFT - _RIGHT) / 2, _HEIGHT - 6, axis, "middle", "axis"))
    for line in series:
        points = [
            (place, scale.at(value), f"{line.name}, {name}: {told(value)}")
            for place, name, value in zip(across, places, line.values, strict=True)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        parts += [
            f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{_escaped(tip)}</title></circle>'
            for x, y, tip in points
        ]
    return _svg(title, _HEIGHT, parts)


def dots(title: str, places: Sequence[str], counts: Sequence[dict[int, int]], axis: str) -> str:
    """Returns, over each place, a dot for each whole number that occurred there, as large as its share, and the means as a line.

    Args:
        title: what the plot tells.
        places: names on the horizontal axis.
        counts: how often each number occurred at each place.
        axis: name of the horizontal axis.
    """
    scale = _Scale.linear(float(max(number for column in counts for number in column)), _HEIGHT - _BOTTOM, _TOP + 8)
    across = _places(len(places))
    parts = [_grid(scale, _whole, only_whole=True)]
    means = []
    for place, name, column in zip(across, places, counts, strict=True):
        parts.append(_text(place, _HEIGHT - _BOTTOM + 18, name, "middle"))
        total = sum(column.values())
        for number, count in column.items():
            radius = 1.5 + 11 * math.sqrt(count / total)
            tip = f"{name}: {count / total:.0%} of the answers from passes of {number}"
            parts.append(
                f'<circle class="share" cx="{place:.1f}" cy="{scale.at(number):.1f}" r="{radius:.1f}">'
                f"<title>{_escaped(tip)}</title></circle>"
            )
        if total:
            mean = sum(number * count for number, count in column.items()) / total
            means.append(f"{place:.1f},{scale.at(mean):.1f}")
    parts.append(f'<polyline class="line mean" points="{" ".join(means)}"/>')
    parts.append(_text((WIDTH + _LEFT - _RIGHT) / 2, _HEIGHT - 6, axis, "middle", "axis"))
    return _svg(title, _HEIGHT, parts)


def bars(
    title: str,
    places: Sequence[str],
    series: Sequence[Series],
    told: Callable[[float], str],
    *,
    as_shares: bool = False,
) -> str:
    """Returns a stacked bar for each place, one below the other, with its total behind it.

    Args:
        title: what the plot tells.
        places: names of the bars.
        series: the parts of each, from left to right.
        told: a value as text.
        as_shares: whether each bar is as long as the others, and its parts are shares of its own total.
    """
    totals = [sum(part.values[index] or 0.0 for part in series) for index in range(len(places))]
    row, start = _row(len(places), 30, 52), _margin(places)
    height = _TOP + len(places) * row + 30
    # The total is written behind the longest bar.
    scale = _Scale.linear(1.0 if as_shares else max(totals), start, WIDTH - 64)
    parts = [_upright(scale, _percent if as_shares else told, _TOP, height - 24)]
    for index, (name, total) in enumerate(zip(places, totals, strict=True)):
        top, thick = _TOP + (index + 0.2) * row, 0.6 * row
        middle = top + thick / 2 + 4
        parts.append(_text(start - 8, middle, name, "end"))
        unit = (total or 1.0) if as_shares else 1.0
        left = 0.0
        for part in series:
            value = part.values[index] or 0.0
            x, width = scale.at(left / unit), scale.at((left + value) / unit) - scale.at(left / unit)
            tip = f"{name}, {part.name}: {told(value)}, {value / total if total else 0:.0%}"
            parts.append(
                f'<rect class="part {part.style}" x="{x:.2f}" y="{top:.1f}" width="{width:.2f}" height="{thick:.1f}">'
                f"<title>{_escaped(tip)}</title></rect>"
            )
            left += value
        parts.append(_text(scale.at(total / unit) + 6, middle, told(total), "start", "value"))
    return _svg(title, height, parts)


def distributions(title: str, rows: Sequence[Spread], told: Callable[[float], str]) -> str:
    """Returns one distribution below the other over a common logarithmic axis, each as high as its highest bar.

    Args:
        title: what the plot tells.
        rows: at least one with a bar.
        told: a value as text.
    """
    edges = [edge for row in rows for low, high, _ in row.bars for edge in (low, high)]
    tall, start = _row(len(rows), 42, 84), _margin([row.name for row in rows])
    height = _TOP + len(rows) * tall + 30
    scale = _Scale.logarithmic(min(edges), max(edges), start, WIDTH - _RIGHT)
    parts = [_upright(scale, told, _TOP, height - 24)]
    for index, row in enumerate(rows):
        bottom = _TOP + (index + 1) * tall
        parts.append(_text(start - 8, bottom - 6, row.name, "end"))
        highest = max((count for _, _, count in row.bars), default=1.0)
        steps = [f"M{scale.at(row.bars[0][0]):.1f},{bottom:.1f}"] if row.bars else []
        for low, high, count in row.bars:
            y = bottom - (tall - 8) * count / highest
            steps.append(f"L{scale.at(low):.1f},{y:.1f}L{scale.at(high):.1f},{y:.1f}")
        if row.bars:
            steps.append(f"L{scale.at(row.bars[-1][1]):.1f},{bottom:.1f}Z")
        parts.append(f'<path class="hill" d="{"".join(steps)}"/>')
        parts.append(f'<line class="base" x1="{start}" x2="{WIDTH - _RIGHT}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
        for value, name in row.marks:
            x = scale.at(value)
            parts.append(
                f'<line class="mark {name}" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom - tall + 8:.1f}" y2="{bottom:.1f}">'
                f"<title>{_escaped(f'{row.name}, {name}: {told(value)}')}</title></line>"
            )
    return _svg(title, height, parts)


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Returns names with their colours: CSS class, then name."""
    told = "".join(f'<li><i class="swatch {style}"></i>{_escaped(name)}</li>' for style, name in items)
    return f'<ul class="legend">{told}</ul>'


@dataclasses.dataclass(frozen=True, slots=True)
class _Scale:
    """Where values lie between two ends of an axis, and which of them are written there."""

    low: float
    high: float
    start: float
    end: float
    is_logarithmic: bool
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> _Scale:
        """Linear from 0, or logarithmic where the largest value would hide the smallest."""
        positive = [value for value in values if value > 0]
        if positive and len(positive) == len(values) and max(positive) > _WIDE_RANGE * min(positive):
            return cls.logarithmic(min(positive), max(positive), start, end)
        return cls.linear(max(values, default=1.0), start, end)

    @classmethod
    def linear(cls, largest: float, start: float, end: float) -> _Scale:
        """From 0 to a round number not below the largest."""
        rough = (largest or 1.0) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
        count = math.ceil((largest or 1.0) / step - 1e-9)
        return cls(0.0, count * step, start, end, False, tuple(index * step for index in range(count + 1)))  # noqa: FBT003

    @classmethod
    def logarithmic(cls, smallest: float, largest: float, start: float, end: float) -> _Scale:
        """From a little below the smallest to a little above the largest; ticks at 1, 2 and 5, fewer over many decades."""
        low, high = smallest / 1.15, largest * 1.15
        factors = (1, 2, 5) if high / low < 2000 else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = tuple(
            factor * 10.0**power
            for power, factor in itertools.product(powers, factors)
            if low <= factor * 10.0**power <= high
        )
        return cls(low, high, start, end, True, ticks)  # noqa: FBT003  # Named a line above.

    def at(self, value: float) -> float:
        """Where a value lies."""
        if self.is_logarithmic:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _row(count: int, least: float, most: float) -> float:
    """How high each of so many rows is, so that few of them fill the plot too."""
    return min(max((_HEIGHT - _BOTTOM) / count, least), most)


def _margin(names: Sequence[str]) -> float:
    """How wide the names of rows are; a guess, since nobody measures text here."""
    return min(max(map(len, names)) * _LETTER + 16, WIDTH / 2)


def _places(count: int) -> list[float]:
    """Where so many places lie on the horizontal axis, with half a place left at both ends."""
    width = (WIDTH - _LEFT - _RIGHT) / count
    return [_LEFT + (index + 0.5) * width for index in range(count)]


def _grid(scale: _Scale, told: Callable[[float], str], *, only_whole: bool = False) -> str:
    drawn = []
    for tick in scale.ticks:
        if only_whole and tick != int(tick):
            continue
        y = scale.at(tick)
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(_text(_LEFT - 8, y + 4, told(tick), "end"))
    return "".join(drawn)


def _upright(scale: _Scale, told: Callable[[float], str], top: float, bottom: float) -> str:
    drawn = []
    for tick in scale.ticks:
        x = scale.at(tick)
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        drawn.append(_text(x, bottom + 16, told(tick), "middle"))
    return "".join(drawn)


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{_escaped(title)}">'
        f"<title>{_escaped(title)}</title>{''.join(parts)}</svg>"
    )


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _escaped(text: str) -> str:
    return html.escape(text)

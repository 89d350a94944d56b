"""The options of `camserve bench`; `command.py` decorates its command with `bench_options`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from camserve.client import words
from camserve.client.bench.kinds import GRAMMAR
from camserve.client.cli_specs import split_numbers

_Command = TypeVar("_Command", bound=Callable[..., Any])


class NumberList(click.ParamType):  # type: ignore[type-arg]  # Generic in click's newest only.
    """Numbers above 0 joined by commas, such as 1,8,32."""

    def __init__(self, kind: type[int | float]) -> None:
        self.name = "N,…" if kind is int else "RATE,…"
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | float, ...]:
        """Returns the numbers."""
        if isinstance(value, tuple):
            return value
        numbers = split_numbers(value, self._kind)
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r} is not a list such as {'1,8,32' if self._kind is int else '5,10,20'}", param, ctx)
        return numbers


class PictureSize(click.ParamType):  # type: ignore[type-arg]
    """Width and height in pixels, such as 640x480."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Returns width and height."""
        if isinstance(value, tuple):
            return value
        width, _, height = value.partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            self.fail(f"{value!r} is not WIDTHxHEIGHT in pixels, such as 640x480", param, ctx)
        return int(width), int(height)


_OPTIONS: Final = (
    click.option("--model", help="Name of the model; may be left out when the server has only one."),
    click.option("--version", "model_version", help="Version of the model; without it the newest that is ready."),
    click.option(
        "--concurrency",
        type=NumberList(int),
        help="Closed loop: so many callers, each asks when it was answered.  [default: 1,4,16]",
    ),
    click.option(
        "--rate", type=NumberList(float), help="Open loop: so many requests a second, due by chance (Poisson)."
    ),
    click.option(
        "--max-in-flight",
        type=click.IntRange(min=1),
        default=1000,
        show_default=True,
        help="Open loop: most requests under way; more are counted as not sent.",
    ),
    click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Length of each load.  [default: 10]"),
    click.option("--requests", type=click.IntRange(min=1), help="Requests of each load, in place of --seconds."),
    click.option(
        "--warm-up",
        type=click.FloatRange(min=0),
        default=2.0,
        show_default=True,
        help="Seconds of each load before it counts.",
    ),
    click.option(
        "-m",
        "--method",
        "methods",
        multiple=True,
        default=("grad-cam",),
        show_default=True,
        metavar=GRAMMAR,
        help="A kind of request and how often it is sent; repeatable. 'prediction' asks for no explanation.",
    ),
    click.option(
        "--layer",
        "layers",
        multiple=True,
        help="Layer of the methods that name none; several are fused.  [default: the model card's]",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any field of a spec, such as target=3 or samples=500; repeatable.",
    ),
    click.option(
        "--baseline",
        "--predict-only",
        "has_baseline",
        is_flag=True,
        help="Also send the same load without explanations, in turn, and tell what they cost.",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=4,
        show_default=True,
        help="With --baseline: parts into which each load is cut, to be sent in turn.",
    ),
    click.option(
        "--synthetic",
        type=PictureSize(),
        help="Made-up JPEGs of this size.  [default without images: 640x480]",
    ),
    click.option("--tensor", is_flag=True, help="Random tensors of the model's own input shape."),
    click.option(
        "--inputs",
        "input_count",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="How many different ones to make up.",
    ),
    click.option("--lane", type=click.Choice(words.LANES.words), help="How urgent it is."),
    click.option(
        "--deadline",
        type=click.FloatRange(min=0, min_open=True),
        help="Seconds after which the server gives up on a request.",
    ),
    click.option(
        "--target-ms",
        type=click.FloatRange(min=0, min_open=True),
        help="An answer is good if it is whole within this time.  [default: the deadline]",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=30.0,
        show_default=True,
        help="Seconds after which a call is given up.",
    ),
    click.option(
        "--connections",
        type=click.IntRange(min=1),
        default=4,
        show_default=True,
        help="HTTP/2 connections, used in turn; at most one a caller.",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Of arrivals, of the order of requests and of made-up inputs.",
    ),
    click.option(
        "--json",
        "json_path",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Write everything as JSON; docs/bench.md tells its keys.",
    ),
    click.option(
        "--html",
        "html_path",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Write a page with plots; one file that needs no other.",
    ),
    click.option(
        "--max-p99-ms",
        type=click.FloatRange(min=0, min_open=True),
        help="Exit with 3 if any load's p99 is above this.",
    ),
    click.option(
        "--fail-above-errors",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Exit with 3 if a larger share of any load failed, such as 0.01.",
    ),
)


def bench_options(command: _Command) -> _Command:
    """Adds all options but the server's address to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command

"""What `camserve models add` and `export` take about a model's input and output: flags to the fields of a `model.toml`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from camserve.server.models.config import ModelConfig

__all__ = ["card_options", "config_from"]

_F = TypeVar("_F", bound=Callable[..., Any])
_KINDS = ["classification", "multi-label", "regression", "embedding", "segmentation", "sequence", "detection"]
_INPUT = ("size", "channels", "resize", "resize_size", "mean", "std", "shape")
_OUTPUT = {"kind": "kind", "output_path": "path"}


def _numbers(kind: type[int | float], *, separator: str, told: str) -> Callable[..., tuple[float, ...] | None]:
    """Reads numbers between separators."""

    def read(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[float, ...] | None:
        try:
            return None if text is None else tuple(kind(part) for part in text.split(separator))
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not {told}") from error

    return read


def _size(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is not PIXELS or HEIGHTxWIDTH, such as 224 or 480x640")
    return int(parts[0]), int(parts[-1])


_OPTIONS = (
    click.option("--size", callback=_size, metavar="N|HxW", help="Input height and width, pixels.  [default: 224]"),
    click.option(
        "--labels",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Class labels, one a line, in order of class index.",
    ),
    click.option(
        "--mean",
        callback=_numbers(float, separator=",", told="numbers between commas, such as 0.485,0.456,0.406"),
        metavar="A,B,C",
        help="Subtracted from each channel after scaling to 0 to 1.  [default: ImageNet's]",
    ),
    click.option(
        "--std",
        callback=_numbers(float, separator=",", told="numbers between commas, such as 0.229,0.224,0.225"),
        metavar="A,B,C",
        help="Divides each channel then.  [default: ImageNet's]",
    ),
    click.option("--channels", type=click.Choice(["rgb", "bgr", "gray", "none"]), help="[default: rgb]"),
    click.option("--resize", type=click.Choice(["stretch", "crop", "letterbox"]), help="[default: stretch]"),
    click.option("--resize-size", type=click.IntRange(min=1), help="Shorter side before a crop, pixels."),
    click.option(
        "--shape",
        callback=_numbers(int, separator=",", told="whole numbers between commas, such as 2,8000"),
        metavar="A,B,…",
        help="Input of one row, with --channels none.",
    ),
    click.option("--kind", type=click.Choice(_KINDS), help="What it returns.  [default: classification]"),
    click.option("--output-path", help="Key or index of it, when the model returns a dict or a tuple."),
    click.option("--default-layer", help="Explained when nothing is asked for.  [default: chosen at load]"),
)


def card_options(command: _F) -> _F:
    """Adds these flags to a command, which gets them by name."""
    return functools.reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), command)


def config_from(options: Mapping[str, Any]) -> ModelConfig | None:
    """The card that the flags describe; None when none was given.

    Raises:
        ValueError: they do not fit together, or the labels cannot be read.
    """
    from camserve.server.models.config import ModelConfig, read_labels  # noqa: PLC0415 - pydantic takes a while, and --help should not

    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return None
    fields: dict[str, Any] = {
        "input": {name: given[name] for name in _INPUT if name in given},
        "output": {field: given[name] for name, field in _OUTPUT.items() if name in given},
    }
    if "default_layer" in given:
        fields["default_layer"] = given["default_layer"]
    if "labels" in given:
        fields["labels"] = read_labels(given["labels"])
    config = ModelConfig.model_validate(fields)
    config.recipe()  # It knows what of the input fits together.
    return config

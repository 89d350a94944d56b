"""The options of `camserve explain` that say what is explained and how, and the specs they mean.

`cli_explain.py` decorates its command with `spec_options` and hands what was given to `specs`, together with the model's card:
class names become indices there, and a sweep the card's stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import click

from camserve.client import words
from camserve.client.boxes import Box
from camserve.client.cards import ModelCard
from camserve.client.specs import Spec
from camserve.client.targets import DetectionBox, Difference, Phrase, Region, Similar, Target, TopK

_Command = TypeVar("_Command", bound=Callable[..., Any])


def split_numbers(value: str, kind: type[int | float]) -> tuple[int | float, ...]:
    """Numbers joined by commas; none where one of them cannot be read."""
    try:
        return tuple(kind(part) for part in value.split(","))
    except ValueError:
        return ()


class Numbers(click.ParamType):  # type: ignore[type-arg]  # Generic in click's newest only.
    """Numbers joined by commas, such as 10,20,64,48."""

    def __init__(self, metavar: str, kind: type[int | float]) -> None:
        self.name = metavar
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | float, ...]:
        """Returns the numbers, as many as the name has."""
        if isinstance(value, tuple):
            return value
        numbers = split_numbers(value, self._kind)
        if len(numbers) != len(self.name.split(",")):
            self.fail(f"{value!r} is not {self.name} in pixels", param, ctx)
        return numbers


BOX: Final = Numbers("LEFT,TOP,WIDTH,HEIGHT", int)
_COUNT: Final = click.IntRange(min=1)
_PARAMETERS: Final[Mapping[str, tuple[click.ParamType[Any], str]]] = {
    "channels": (_COUNT, "Most channels to score."),
    "samples": (_COUNT, "Noisy copies, or random masks."),
    "steps": (_COUNT, "Steps of an integral."),
    "noise": (click.FloatRange(min=0), "Standard deviation of noise, as a share of the input's range."),
    "window": (_COUNT, "Side of an occluding patch or a pooling window."),
    "stride": (_COUNT, "Step from one patch to the next."),
    "concepts": (_COUNT, "How many concept maps."),
    "similar_classes": (_COUNT, "How many of the nearest classes to compare with."),
    "contrast": (click.FLOAT, "Weight of those classes."),
    "seed": (click.INT, "Seed of every random choice."),
}
_OPTIONS: Final = (
    click.option(
        "-m", "--method", "methods", multiple=True, default=("grad-cam",), show_default=True, help="Method; repeatable."
    ),
    click.option("--layer", "layers", multiple=True, help="Layer; several are fused.  [default: the model card's]"),
    click.option(
        "--sweep", is_flag=True, help="One explanation at each stage of the model: what each resolution looks at."
    ),
    click.option("--target", help="Class label, or class index if a number; without it the predicted class."),
    click.option("--top-k", type=_COUNT, help="One map for each of this many best classes."),
    click.option("--against", metavar="CLASS", help="Why --target rather than this class."),
    click.option(
        "--polarity", type=click.Choice(words.POLARITIES.words), help="Evidence for the target or against it."
    ),
    click.option("--score", type=click.Choice(words.SCORES.words), help="Which number of the class is differentiated."),
    click.option("--box", type=BOX, help="Of a segmentation, the cells in this box; of a detector, the object there."),
    click.option("--point", type=Numbers("X,Y", float), help="Of a segmentation, the cell at this point."),
    click.option("--phrase", help="Of an embedding, the similarity to this phrase of the model card."),
    click.option(
        "--similar", type=click.Path(), metavar="IMAGE", help="Of an embedding, the similarity to this image."
    ),
    click.option(
        "--regions",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="THRESHOLD",
        help="Boxes around the cells that reach this share of the map's largest value.",
    ),
    click.option(
        "--saliency", type=click.Choice(words.SALIENCIES.words), help="How channels of a map of the input are sent."
    ),
    click.option("--augment", is_flag=True, help="Calmer: the mean over flips and scalings; six passes for one."),
    click.option("--eigen-smooth", is_flag=True, help="Calmer: the first principal component in place of the sum."),
    click.option("--allow-partial", is_flag=True, help="Send the best map so far when the deadline comes."),
    *(
        click.option(f"--{name.replace('_', '-')}", type=kind, help=f"{told} Only for methods that read it.")
        for name, (kind, told) in _PARAMETERS.items()
    ),
)


def spec_options(command: _Command) -> _Command:
    """Adds the options that say what is explained to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def specs(options: Mapping[str, Any], card: ModelCard | None, *, raw: bool) -> list[Spec]:
    """Returns one spec for each method, or with a sweep for each method and stage.

    Args:
        options: as click read them.
        card: of the model; None checks what can be checked without one.
        raw: whether values are wanted that are exact.

    Raises:
        click.UsageError: wrong words, and options that contradict each other.
    """
    _check(options)
    # A map that is written down should be exact; one that is only looked at may be small.
    shared = {
        "target": _target(options, card),
        "polarity": options["polarity"],
        "score": options["score"],
        "saliency": options["saliency"],
        "region_threshold": options["regions"],
        "augmentation_smooth": options["augment"],
        "eigen_smooth": options["eigen_smooth"],
        "allow_partial": options["allow_partial"],
        "encoding": "float32" if raw else None,
        **{name: options[name] for name in _PARAMETERS},
    }
    try:
        made = [
            Spec(method, layers=layers, **shared) for method in options["methods"] for layers in _places(options, card)
        ]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    # The same method twice would write the same file twice.
    return list({(words.METHODS.name(spec.method), tuple(spec.layers)): spec for spec in made}.values())


def _check(options: Mapping[str, Any]) -> None:
    classes = ("target", "top_k") if options["top_k"] is not None else ("target",)
    places = [name for name in ("box", "point", "phrase", "similar") if options[name] is not None]
    if len(places) > 1:
        raise click.UsageError(f"{_flags(places)} contradict each other: give one")
    given = [name for name in (*classes, "against") if options[name] is not None]
    if options["top_k"] is not None and len(given) > 1:
        raise click.UsageError(f"{_flags(given)} contradict each other: give one")
    if places and given and given != ["target"]:
        raise click.UsageError(f"{_flags([*places, *given])} contradict each other: give one")
    if places in (["phrase"], ["similar"]) and given:
        raise click.UsageError(f"{_flags([*places, *given])} contradict each other: an embedding has no classes")
    if options["against"] is not None and options["target"] is None:
        raise click.UsageError("--against needs the class argued for: add --target CLASS")
    if options["sweep"] and options["layers"]:
        raise click.UsageError("--sweep and --layer contradict each other: a sweep takes the model's stages")


def _flags(names: Sequence[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


def _places(options: Mapping[str, Any], card: ModelCard | None) -> list[Sequence[str]]:
    if not options["sweep"] or card is None:
        return [options["layers"]]
    if not card.stages:
        raise click.UsageError(f"the card of {card.name} names no stages to sweep; name layers with --layer")
    return [(stage,) for stage in card.stages]


def _target(options: Mapping[str, Any], card: ModelCard | None) -> Target:
    target: str | None = options["target"]
    about: Target = int(target) if target and target.isdecimal() else target
    if options["top_k"] is not None:
        about = TopK(options["top_k"])
    elif options["phrase"] is not None:
        about = Phrase(options["phrase"])
    elif card is not None:  # The others are looked up on it.
        if options["against"] is not None and target is not None:
            about = Difference(_class_index(target, card), _class_index(options["against"], card))
        elif options["similar"] is not None:
            about = Similar(options["similar"])
        elif options["box"] is not None or options["point"] is not None:
            about = _place(options, target, card)
    return about


def _place(options: Mapping[str, Any], target: str | None, card: ModelCard) -> Target:
    class_index = None if target is None else _class_index(target, card)
    if options["point"] is not None:
        return Region(point=options["point"], class_index=class_index)
    box = Box(*options["box"])
    return (
        DetectionBox(box, class_index) if card.output_kind == "detection" else Region(box=box, class_index=class_index)
    )


def _class_index(name: str, card: ModelCard) -> int:
    if name.isdecimal():
        return int(name)
    if card.labels.count(name) != 1:
        known = ", ".join(card.labels[:20]) + (" …" if len(card.labels) > 20 else "")
        raise click.UsageError(
            f"{name!r} is not one label of {card.name}: {known or 'its card has none; use an index'}"
        )
    return card.labels.index(name)

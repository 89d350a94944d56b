"""What `camserve models add` and `export` share on the command line: where an entry goes, and what is then said of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from camserve.server.entries.check import Account
    from camserve.server.entries.placing import Place

__all__ = ["let_torch_be_quiet", "place_options", "tell_added"]


def place_options(command: Any) -> Any:
    """Adds the flags that name an entry of a repository."""
    for option in (
        click.option("--device", help="Where it is tried: auto, cpu, cuda or cuda:N.  [default: auto]"),
        click.option("--version", default="", help="Of the entry.  [default: the next number]"),
        click.option("--name", default="", help="Of the model.  [default: from the file or the factory]"),
        click.option(
            "--models",
            "repository",
            required=True,
            type=click.Path(path_type=Path, file_okay=False),
            help="Model repository folder; made if it does not exist.",
        ),
    ):
        command = option(command)
    return command


def tell_added(place: Place, account: Account) -> None:
    """What was added, and what to do next."""
    from camserve.server.models.sources import read_folder  # noqa: PLC0415 - pydantic takes a while, and --help should not

    card = account.card
    if card is None:  # Then it was not added.
        return
    works = sum(method.works for method in card.methods)
    click.echo(f"Added {place.name}, version {place.version}: {place.folder / place.version}")
    click.echo(
        f"{card.kind}, {card.class_count} classes, {len(card.layers)} layers, explained at {card.default_layer} unless asked "
        f"otherwise; {works} of {len(card.methods)} methods work."
    )
    serving = [source.version for source in read_folder(place.folder).wanted]
    if place.version not in serving:
        click.echo(
            f"It does not serve yet: [versions] in {place.folder / 'model.toml'} selects {', '.join(serving)}; add it there."
        )
    click.echo("\nNext:")
    if place.is_new:
        click.echo(f"  read {place.folder / 'model.toml'}: is [input] what the model was trained with?")
    click.echo(f"  camserve models check {place.root} --name {place.name}")
    click.echo(f"  camserve serve --models {place.root}    or, where that runs: camserve models load {place.name}")


def let_torch_be_quiet() -> None:
    """Serving archives that PyTorch calls deprecated is what we are for."""
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)

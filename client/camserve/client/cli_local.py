"""`camserve explain --local MODEL`: the same command without a server.

The model is loaded in this process by the server package, which is found through an entry point and never imported here. What it
gives is asked as a `Client` would be.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from camserve.client.sync_client import Client

_Command = TypeVar("_Command", bound=Callable[..., Any])
_GROUP: Final = "camserve.local"
_OPTIONS: Final = (
    click.option(
        "--local",
        metavar="[NAME=]FILE|FOLDER|FACTORY",
        help="Load this model here and ask no server; 'demo' is the shipped one. Needs camserve[server].",
    ),
    click.option("--size", type=click.IntRange(min=1), help="Input height and width for --local, pixels."),
    click.option(
        "--labels",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Class labels for --local, one a line.",
    ),
)


def local_options(command: _Command) -> _Command:
    """Adds the options that name a model of this machine to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def client_for(server: str, options: Mapping[str, Any]) -> AbstractContextManager[Client]:
    """Returns a client of the server, or what answers in its place if the options name a model of this machine.

    Args:
        server: address.
        options: as click read them.

    Raises:
        click.UsageError: options that mean something only with, or only without, a server.
        click.ClickException: the server package is not installed, or the model cannot be loaded.
    """
    if options["local"] is None:
        for name in ("size", "labels"):
            if options[name] is not None:
                raise click.UsageError(f"--{name} is for --local; a server's models have cards that tell it")
        return Client(server, timeout=options["timeout"], credentials=options["credentials"])
    entry_points = importlib.metadata.entry_points(group=_GROUP)
    try:
        opened = next(iter(entry_points)).load()
    except (ImportError, StopIteration) as error:
        raise click.ClickException("--local needs more than the client: pip install 'camserve[server]'") from error
    try:
        return opened(  # type: ignore[no-any-return]  # An entry point has no type.
            options["local"], size=options["size"], labels=options["labels"], timeout=options["timeout"]
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from error

"""`camserve models`: which models a server has, the card of one, and the commands of others about models.

The server's commands for a folder of models (`check`, `add`, `export`) are found through the entry-point group
`camserve.commands.models`, so that the client never imports them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Final

import click

from camserve.client.cli_groups import DefaultCommandGroup
from camserve.client.errors import CamserveError, Unavailable
from camserve.client.sync_client import Client

_EXAMPLES = """
\b
Examples:
  camserve models                        every model of the server on this machine
  camserve models surface                its card: layers, methods, labels
  camserve models --json | jq '.[].name'
  camserve models --server gpu7:50051
  camserve models show add               the card of a model that is called like a command
  camserve models check /srv/models      would this folder be served? asks no server
"""
_TOLD: Final = {
    "add": "Put an archive into a model repository.",
    "check": "Load the models of a repository, without serving, and tell what they can do.",
    "export": "Write an archive of a factory's model into a model repository.",
}

server_option = click.option(
    "--server", default="localhost:50051", show_default=True, metavar="HOST:PORT", envvar="CAMSERVE_SERVER",
    show_envvar=True, help="Address of the server.",
)  # fmt: skip


@click.command("show")
@click.argument("name", required=False)
@click.option("--version", "model_version", help="Version of the model; without it the newest that is ready.")
@server_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def show(name: str | None, model_version: str | None, server: str, as_json: bool) -> None:  # noqa: FBT001  # click's flag.
    """List the models of a server, or show the card of the one called NAME."""
    from camserve.client import tables  # noqa: PLC0415  # rich is slow to import, and --help and explain do without it.

    with told_briefly(server), Client(server) as client:
        if name is not None:
            card = client.model(name, model_version)
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(card), indent=2))
            else:
                tables.show_card(card)
            return
        statuses = client.models()
        if as_json:
            click.echo(json.dumps([dataclasses.asdict(status) for status in statuses], indent=2))
        else:
            tables.show_statuses(statuses)


@click.group(
    "models",
    cls=DefaultCommandGroup,
    default=show,
    found_in="camserve.commands.models",
    told=_TOLD,
    epilog=_EXAMPLES,
)
def models() -> None:
    """List the models of a server, or show the card of the one called NAME.

    With a command, look after a folder of models instead.
    """


@contextlib.contextmanager
def told_briefly(server: str) -> Iterator[None]:
    """Turns errors into one line and exit status 1."""
    try:
        yield
    except Unavailable as error:
        if error.reason:  # A camserve answered: it is draining or loading.
            raise click.ClickException(str(error)) from error
        why = error.message.rsplit(": ", 1)[-1]  # What comes before are gRPC's layers.
        raise click.ClickException(f"no camserve at {server} ({why}); start one with `camserve serve`") from error
    except CamserveError as error:
        raise click.ClickException(str(error)) from error

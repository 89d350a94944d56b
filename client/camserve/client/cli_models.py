"""`camserve models`: which models a server has, the card of one, and the commands of others about models.

The server's commands for a folder of models (`check`, `add`, `export`) are found through the entry-point group
`camserve.commands.models`, so that the client never imports them.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Final

import click

from camserve.client.cli_connection import connection_options, told_briefly
from camserve.client.cli_groups import DefaultCommandGroup
from camserve.client.credentials import Credentials
from camserve.client.retries import LOADING_SECONDS
from camserve.client.sync_client import Client

_EXAMPLES = """
\b
Examples:
  camserve models                        every model of the server on this machine
  camserve models surface                its card: layers, methods, labels
  camserve models --json | jq '.[].name'
  camserve models --server gpu7:50051
  CAMSERVE_API_KEY=camserve_… camserve models --server gpu7:50051 --ca ca.pem
  camserve models load surface           serve what its repository holds of it now
  camserve models unload surface --version 1
  camserve models show add               the card of a model that is called like a command
  camserve models check /srv/models      would this folder be served? asks no server
"""
_TOLD: Final = {
    "add": "Put an archive into a model repository.",
    "check": "Load the models of a repository, without serving, and tell what they can do.",
    "export": "Write an archive of a factory's model into a model repository.",
}


@click.command("show")
@click.argument("name", required=False)
@click.option("--version", "model_version", help="Version of the model; without it the newest that is ready.")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def show(name: str | None, model_version: str | None, server: str, credentials: Credentials, as_json: bool) -> None:  # noqa: FBT001  # click's flag.
    """List the models of a server, or show the card of the one called NAME."""
    from camserve.client import tables  # noqa: PLC0415  # rich is slow to import, and --help and explain do without it.

    with told_briefly(server, credentials), Client(server, credentials=credentials) as client:
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

    With a command, load or unload one, or look after a folder of models.
    """


_version_option = click.option("--version", "model_version", help="Version of the model, or a label.")
_timeout_option = click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=LOADING_SECONDS, show_default=True,
    help="Seconds to wait; the server goes on without us.",
)  # fmt: skip


@models.command("load")
@click.argument("name")
@_version_option
@connection_options
@_timeout_option
def load(name: str, model_version: str | None, server: str, credentials: Credentials, timeout: float) -> None:
    """Load NAME from the server's repository.

    What has changed of it is loaded anew; waits until it serves. Without a version, those serve that its model.toml asks for,
    and no others.
    """
    with told_briefly(server, credentials), Client(server, credentials=credentials) as client:
        card = client.load_model(name, model_version, timeout=timeout)
    click.echo(f"{card.name} version {card.version} is ready")


@models.command("unload")
@click.argument("name")
@_version_option
@connection_options
@_timeout_option
def unload(name: str, model_version: str | None, server: str, credentials: Credentials, timeout: float) -> None:
    """Unload NAME, or one version of it.

    Waits until its last request is answered and its memory is free.
    """
    with told_briefly(server, credentials), Client(server, credentials=credentials) as client:
        client.unload_model(name, model_version, timeout=timeout)
    click.echo(f"{name}{f' version {model_version}' if model_version else ''} is unloaded")

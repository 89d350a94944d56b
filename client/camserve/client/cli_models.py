"""`camserve models`: which models a server has, and the card of one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import click

from camserve.client.errors import CamserveError, Unavailable
from camserve.client.sync_client import Client

_EXAMPLES = """
\b
Examples:
  camserve models                        every model of the server on this machine
  camserve models surface                its card: layers, methods, labels
  camserve models --json | jq '.[].name'
  camserve models --server gpu7:50051
"""

server_option = click.option(
    "--server", default="localhost:50051", show_default=True, metavar="HOST:PORT", envvar="CAMSERVE_SERVER",
    show_envvar=True, help="Address of the server.",
)  # fmt: skip


@click.command(epilog=_EXAMPLES)
@click.argument("name", required=False)
@click.option("--version", "model_version", help="Version of the model; without it the newest that is ready.")
@server_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def models(name: str | None, model_version: str | None, server: str, as_json: bool) -> None:  # noqa: FBT001  # click's flag.
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

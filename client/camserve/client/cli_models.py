"""`camserve models`: which models a server has, and the card of one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from camserve.client.cards import ModelCard, ModelStatus
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
    with told_briefly(server), Client(server) as client:
        if name is not None:
            card = client.model(name, model_version)
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(card), indent=2))
            else:
                _show_card(card)
            return
        statuses = client.models()
        if as_json:
            click.echo(json.dumps([dataclasses.asdict(status) for status in statuses], indent=2))
        else:
            _show_statuses(statuses)


@contextlib.contextmanager
def told_briefly(server: str) -> Iterator[None]:
    """Turns errors into one line and exit status 1."""
    try:
        yield
    except Unavailable as error:
        if error.reason:  # A camserve answered: it is draining or loading.
            raise click.ClickException(str(error)) from error
        raise click.ClickException(
            f"no camserve at {server} ({error.message}); start one with `camserve serve`"
        ) from error
    except CamserveError as error:
        raise click.ClickException(str(error)) from error


def _show_statuses(statuses: tuple[ModelStatus, ...]) -> None:
    table = Table(title="Models")
    for heading in ("name", "version", "state", "classes", "default layer", "error"):
        table.add_column(heading)
    colours = {"ready": "green", "loading": "yellow", "failed": "red"}
    for status in statuses:
        state = f"[{colours.get(status.state, 'default')}]{escape(status.state)}[/]"
        classes = str(status.class_count) if status.state == "ready" else ""
        table.add_row(
            escape(status.name),
            escape(status.version),
            state,
            classes,
            escape(status.default_layer),
            escape(status.error),
        )
    Console().print(table)


def _show_card(card: ModelCard) -> None:
    console = Console()
    facts = Table(title=f"{escape(card.name)}, version {escape(card.version)}", show_header=False)
    labels = ", ".join(card.labels[:10]) + (" …" if len(card.labels) > 10 else "")
    shape = " x ".join(map(str, card.input.shape))
    for key, value in (
        ("classes", f"{card.class_count}: {labels}" if labels else str(card.class_count)),
        ("input", f"{shape} {card.input.channels}, {card.input.resize}"),
        ("kind", f"{card.kind} on {card.device} in {card.dtype}"),
        ("batch", _batch(card)),
        ("model sha256", card.model_sha256),
        ("warm-up", f"{card.warm_up_seconds:.2f} s"),
        *(("note", note) for note in card.notes),
    ):
        facts.add_row(key, escape(value))
    console.print(facts)

    layers = Table(title="Layers")
    for heading in ("name", "shape", "layout", "map", "refusal"):
        layers.add_column(heading)
    for layer in card.layers:
        name = f"{layer.name} (default)" if layer.name == card.default_layer else layer.name
        sizes = (" x ".join(map(str, size)) for size in (layer.shape, layer.map_shape))
        shape_text, map_text = sizes
        layers.add_row(escape(name), shape_text, layer.layout, map_text, escape(layer.refusal))
    console.print(layers)

    methods = Table(title="Methods")
    for heading in ("method", "works", "note"):
        methods.add_column(heading)
    for method in card.methods:
        methods.add_row(method.method, "[green]yes[/]" if method.works else "[red]no[/]", escape(method.note))
    console.print(methods)


def _batch(card: ModelCard) -> str:
    is_static = card.static_batch_rows is not None
    rows = f"exactly {card.static_batch_rows} rows" if is_static else f"up to {card.max_batch_rows} rows"
    return rows if card.rows_independent else f"{rows}; rows influence each other, so each goes alone"

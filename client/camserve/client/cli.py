"""The `camserve` command: `explain`, `models` and `bench` here, the server's own commands found through an entry-point group.

The group `camserve.commands` is read without importing what it names, so that `camserve --help` is quick and never loads torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Final

import click

from camserve.client.cli_explain import explain
from camserve.client.cli_models import models

_GROUP: Final = "camserve.commands"
# Commands of the client that are imported when they are run: the others need not wait for what these import.
_LATER: Final = {"bench": "camserve.client.bench.command"}
# Told without importing them; a command not named here is introduced by where it comes from.
_KNOWN: Final = {
    "bench": "Offer load to a server and tell how it fares.",
    "demo": "Explain the sample images with the shipped model and write a report.",
    "methods": "List the methods of explanation, or show one in full.",
    "serve": "Serve models over gRPC.",
}
_EXAMPLES: Final = """
\b
Examples:
  camserve serve                                       a server with the demo model on port 50051
  camserve models                                      what it serves
  camserve explain part.png --out maps                 predict and explain one image
  camserve explain photos/ -m grad-cam -m layercam --out maps
  camserve bench --rate 5,10,20                        how it fares under load
"""


class CommandGroup(click.Group):
    """A group whose further commands are entry points, imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *_LATER, *_entry_points()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a command, importing it if need be; None when there is none."""
        if cmd_name in _LATER:
            later: click.Command = getattr(importlib.import_module(_LATER[cmd_name]), cmd_name)
            return later
        own = super().get_command(ctx, cmd_name)
        entry_point = _entry_points().get(cmd_name)
        if own is not None or entry_point is None:
            return own
        try:
            command = entry_point.load()
        except ImportError as error:
            return _missing(cmd_name, error)
        if not isinstance(command, click.Command):
            raise click.ClickException(f"the entry point of 'camserve {cmd_name}' is no click command")
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command; the server's import what is heavy only when they run, and may then find it missing."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if ctx.invoked_subcommand in _entry_points():
                raise _needs_more(ctx.invoked_subcommand, error) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands without importing any."""
        rows = []
        for name in self.list_commands(ctx):
            own = self.commands.get(name)
            told = own.get_short_help_str(80) if own else _KNOWN.get(name) or f"From {_entry_points()[name].value}."
            rows.append((name, told))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry_point.name: entry_point for entry_point in importlib.metadata.entry_points(group=_GROUP)}


def _needs_more(name: str, error: ImportError) -> click.ClickException:
    return click.ClickException(
        f"'camserve {name}' needs more than the client: pip install 'camserve[server]' ({error})"
    )


def _missing(name: str, error: ImportError) -> click.Command:
    """Returns a stand-in for a command whose package is not installed: whatever its arguments, it says what to install."""

    def refuse(arguments: tuple[str, ...]) -> None:  # noqa: ARG001  # Only swallowed, so that click does not complain first.
        raise _needs_more(name, error)

    return click.Command(
        name,
        callback=refuse,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
    )


@click.group("camserve", cls=CommandGroup, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="camserve", message="%(prog)s %(version)s")
def main() -> None:
    """Explain what an image model looked at: the prediction first, then why."""


main.add_command(explain)
main.add_command(models)

"""Groups of commands, some of which are other packages': the server's join `camserve` and `camserve models` through entry points.

Entry points are read without importing what they name, so that `--help` is quick and never loads torch. `cli.py` and
`cli_models.py` make their groups from the classes here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping

import click

__all__ = ["CommandGroup", "DefaultCommandGroup"]


class CommandGroup(click.Group):
    """A group whose further commands are entry points, imported when they are run.

    Args:
        found_in: the group of entry points.
        told: one line about each of those that are known; another command is introduced by where it comes from.
        later: commands of the client itself that are imported when they are run, by the module that has them under that name.
    """

    def __init__(
        self,
        *arguments: object,
        found_in: str,
        told: Mapping[str, str] | None = None,
        later: Mapping[str, str] | None = None,
        **attributes: object,
    ) -> None:
        super().__init__(*arguments, **attributes)  # type: ignore[arg-type]  # click's own, handed through.
        self._found_in = found_in
        self._told = dict(told or {})
        self._later = dict(later or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *self._later, *self._entry_points()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a command, importing it if need be; None when there is none."""
        if cmd_name in self._later:
            later: click.Command = getattr(importlib.import_module(self._later[cmd_name]), cmd_name)
            return later
        own = super().get_command(ctx, cmd_name)
        entry_point = self._entry_points().get(cmd_name)
        if own is not None or entry_point is None:
            return own
        name = f"{ctx.command_path} {cmd_name}"
        try:
            command = entry_point.load()
        except ImportError as error:
            return _missing(name, error)
        if not isinstance(command, click.Command):
            raise click.ClickException(f"the entry point of '{name}' is no click command")
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command; the server's import what is heavy only when they run, and may then find it missing."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if ctx.invoked_subcommand in self._entry_points():
                raise _needs_more(f"{ctx.command_path} {ctx.invoked_subcommand}", error) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands without importing any."""
        found = self._entry_points()
        rows = []
        for name in self.list_commands(ctx):
            own = self.commands.get(name)
            told = own.get_short_help_str(80) if own else self._told.get(name) or f"From {found[name].value}."
            rows.append((name, told))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {found.name: found for found in importlib.metadata.entry_points(group=self._found_in)}


class DefaultCommandGroup(CommandGroup):
    """A group that runs one of its commands when the first word names none.

    Args:
        default: the command that is then run with all of the arguments; its options are told in the group's help.
    """

    def __init__(self, *arguments: object, default: click.Command, found_in: str, **attributes: object) -> None:
        super().__init__(*arguments, found_in=found_in, **attributes)  # type: ignore[arg-type]  # click's own.
        self.add_command(default)
        self._default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the default command in front of what does not begin with a command."""
        if not args or (args[0] not in self.list_commands(ctx) and args[0] not in self.get_help_option_names(ctx)):
            args = [str(self._default.name), *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes both ways to call the group."""
        formatter.write_usage(ctx.command_path, " ".join(self._default.collect_usage_pieces(ctx)))
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options of the default command, and the commands."""
        click.Command.format_options(self._default, ctx, formatter)
        self.format_commands(ctx, formatter)


def _needs_more(name: str, error: ImportError) -> click.ClickException:
    return click.ClickException(f"'{name}' needs more than the client: pip install 'camserve[server]' ({error})")


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

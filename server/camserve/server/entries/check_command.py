"""`camserve models check`: would this repository be served, and what could be asked of it?

Found by the light client through the entry-point group `camserve.commands.models`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from camserve.server.entries.place_options import let_torch_be_quiet

if TYPE_CHECKING:
    from camserve.server.entries.check import Finding

__all__ = ["check"]

_EXAMPLES = """
\b
Examples:
  camserve models check /srv/models                     each model: its card, what one pass takes
  camserve models check /srv/models --name part         one of them
  camserve models check /srv/models --device cuda --max-batch-rows 32
  camserve models check /srv/models --json | jq '.[] | select(.works | not)'

Exit status 0 when everything could be served, 1 when something could not.
"""


@click.command(epilog=_EXAMPLES)
@click.argument("repository", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--name", default="", help="Look at this model only.")
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file of settings.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option("--max-batch-rows", type=int, help="Most rows in one pass.  [default: 16]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def check(
    repository: Path,
    name: str,
    config: Path | None,
    as_json: bool,  # noqa: FBT001 - click's flag
    **flags: Any,
) -> None:
    """Load the models of the repository DIR as a server would, without serving, and tell what each can do.

    Settings come from flags, environment and --config, as for `camserve serve`. A model that fails is told with its reason, and
    the others are still looked at.
    """
    # Imported here: torch takes seconds, and --help should not.
    from camserve.server.entries import account_tables  # noqa: PLC0415
    from camserve.server.entries.check import check_all, findings  # noqa: PLC0415
    from camserve.server.settings import complaint, load_settings  # noqa: PLC0415

    let_torch_be_quiet()
    accounts = []
    try:
        settings = load_settings(config, **flags)
        found = findings(repository, name)
        _tell_next(found, 0)
        for account in check_all(found, settings):
            accounts.append(account)
            if not as_json:
                account_tables.show_account(account)
            _tell_next(found, len(accounts))
    except ValueError as error:
        raise click.ClickException(complaint(error)) from error
    if as_json:
        click.echo(json.dumps([account_tables.as_json(account) for account in accounts], indent=2))
    failed = [f"{account.name} {account.version}".strip() for account in accounts if account.error]
    works = len(accounts) - len(failed)
    click.echo(
        f"{works} of {len(accounts)} can be served" + (f", not: {', '.join(failed)}" if failed else ""), err=True
    )
    sys.exit(1 if failed else 0)


def _tell_next(found: list[Finding], done: int) -> None:
    """A line on standard error, so that a slow load is not taken for a hang."""
    if done < len(found):
        named = f"{found[done].name} {found[done].version}".strip()
        click.echo(f"({done + 1} of {len(found)}) loading {named} …", err=True)

"""`camserve models add`: a bare archive becomes an entry of a model repository.

Found by the light client through the entry-point group `camserve.commands.models`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from camserve.server.entries.card_options import card_options, config_from
from camserve.server.entries.place_options import let_torch_be_quiet, place_options, tell_added

__all__ = ["add"]

_EXAMPLES = """
\b
Examples:
  camserve models add part.pt --models /srv/models --size 160 --labels labels.txt
  camserve models add part.pt2 --models /srv/models --name board --mean 0.5 --std 0.25 --resize crop
  camserve models add better/part.pt --models /srv/models       the next version; the card stays

A new model gets a model.toml with what these flags say; one that exists keeps its own, and gets the next version.
"""


@click.command(epilog=_EXAMPLES)
@click.argument("archive", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@place_options
@card_options
def add(archive: Path, repository: Path, name: str, version: str, device: str | None, **card: Any) -> None:
    """Put the TorchScript or torch.export file ARCHIVE into a model repository, after loading and trying it.

    Nothing is overwritten, and a server never sees half an entry.
    """
    from camserve.server.entries.adding import archive_name, put  # noqa: PLC0415
    from camserve.server.entries.placing import find_place  # noqa: PLC0415
    from camserve.server.settings import complaint, load_settings  # noqa: PLC0415

    let_torch_be_quiet()

    def copied(folder: Path) -> Path:
        return Path(shutil.copyfile(archive, folder / archive_name(archive)))

    try:
        settings = load_settings(device=device)
        archive_name(archive)
        place = find_place(repository, name or archive.stem, version)
        click.echo(f"Loading {archive} …", err=True)
        account = put(
            place, copied, config_from(card), told=f"Added from {json.dumps(archive.name)}.", settings=settings
        )
    except ValueError as error:
        raise click.ClickException(complaint(error)) from error
    tell_added(place, account)

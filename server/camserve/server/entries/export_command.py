"""`camserve models export`: a factory's model becomes an archive, and an entry of a model repository.

Found by the light client through the entry-point group `camserve.commands.models`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from camserve.server.entries.card_options import card_options, config_from
from camserve.server.entries.place_options import let_torch_be_quiet, place_options, tell_added

if TYPE_CHECKING:
    from camserve.server.entries.exporting import ArchiveFormat

__all__ = ["export"]

_EXAMPLES = """
\b
Examples:
  camserve models export torchvision:resnet18 --models /srv/models
  camserve models export torchvision:resnet18 --models /srv/models --format pt2 --random-weights 0
  camserve models export torchvision:resnet18 --models /srv/models --name part \\
      --weights part.safetensors --option num_classes=4 --labels labels.txt
  camserve models export plant.nets:build --allow-import plant.nets --weights net.pth --models /srv/models

Without --random-weights or --weights the library's own are taken, through its own download.
"""


@click.command(epilog=_EXAMPLES)
@click.argument("factory")
@place_options
@click.option(
    "--format", "archive_format", type=click.Choice(["torchscript", "pt2"]), default="torchscript", show_default=True
)
@click.option("--random-weights", "random_seed", type=int, metavar="SEED", help="Random weights, for benchmarks.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="State dict: .safetensors, or of torch.save.",
)
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Argument of the factory; repeatable.")
@click.option(
    "--allow-import", "allowed", multiple=True, metavar="MODULE", help="Module a factory of yours may come from."
)
@card_options
def export(  # noqa: PLR0913 - each is a flag of its own.
    *,
    factory: str,
    repository: Path,
    name: str,
    version: str,
    device: str | None,
    archive_format: ArchiveFormat,
    random_seed: int | None,
    weights: Path | None,
    options: tuple[str, ...],
    allowed: tuple[str, ...],
    **card: Any,
) -> None:
    """Write an archive of the model that FACTORY builds into a model repository, after comparing their answers.

    FACTORY is torchvision:NAME, timm:NAME, or package.module:function with --allow-import.
    """
    from camserve.server.engine.factories import build_module  # noqa: PLC0415
    from camserve.server.entries.adding import put  # noqa: PLC0415
    from camserve.server.entries.exporting import Written, write_archive  # noqa: PLC0415
    from camserve.server.entries.placing import find_place  # noqa: PLC0415
    from camserve.server.errors import CamserveError  # noqa: PLC0415
    from camserve.server.models.config import FactoryConfig, ModelConfig  # noqa: PLC0415
    from camserve.server.models.presets import with_published_preset  # noqa: PLC0415
    from camserve.server.settings import complaint, load_settings  # noqa: PLC0415

    let_torch_be_quiet()
    if weights is not None and random_seed is not None:
        raise click.UsageError("--weights and --random-weights contradict each other; give one")
    is_pretrained = weights is None and random_seed is None
    written: list[Written] = []
    try:
        settings = load_settings(device=device)
        place = find_place(repository, name or factory.rpartition(":")[2], version)
        config = config_from(card)
        described = (config or ModelConfig()).model_copy(
            update={"factory": FactoryConfig(name=factory, pretrained=is_pretrained)}
        )
        described = with_published_preset(described).model_copy(update={"factory": None})
        click.echo(f"Building {factory} …", err=True)
        module = build_module(
            factory,
            weights=weights,
            random_seed=random_seed,
            pretrained=is_pretrained,
            allowed_imports=allowed,
            options=dict(_option(text) for text in options),
        )

        def write(folder: Path) -> Path:
            click.echo(f"Writing {archive_format} …", err=True)
            written.append(write_archive(module, described.recipe().shape, archive_format, folder))
            return written[0].path

        told = f"Exported from {factory}{'' if random_seed is None else f', random weights, seed {random_seed}'}."
        # A model that exists keeps its card, which is only in question if something was said about it.
        account = put(place, write, described if place.is_new else config, told=told, settings=settings)
    except (ValueError, CamserveError) as error:
        raise click.ClickException(complaint(error)) from error
    deviation = written[0].deviation
    alike = "bit for bit" if deviation == 0 else f"within {deviation:.1e} of its largest output"
    click.echo(f"{written[0].how[0].upper()}{written[0].how[1:]}; answers as the factory's model {alike}.", err=True)
    tell_added(place, account)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise click.BadParameter(f"{text!r} is not KEY=VALUE, such as num_classes=4", param_hint="--option")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value

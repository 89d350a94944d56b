"""An archive becomes a version of a model in a repository, once it was seen to load and to be explainable there.

Arrives: a place, something that writes the archive, and the card of a new model. Leaves: the account of the check; on any failure
nothing. `add_command.py` and `export_command.py` call this.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from camserve.server.entries.card_file import LABELS_FILE, card_text, labels_text
from camserve.server.entries.check import Account, check_source
from camserve.server.entries.placing import Place, Staging, staged
from camserve.server.models.config import ModelConfig, read_config
from camserve.server.models.sources import ModelSource
from camserve.server.settings import Settings

__all__ = ["CARD_FILE", "archive_name", "put"]

CARD_FILE = "model.toml"
_ARCHIVES = {".pt2": "model.pt2", ".pt": "model.pt", ".pth": "model.pt", ".ts": "model.pt", ".torchscript": "model.pt"}


def archive_name(path: Path) -> str:
    """What an archive is called in a repository.

    Raises:
        ValueError: its ending is of no archive that is served.
    """
    if path.suffix not in _ARCHIVES:
        raise ValueError(
            f"{path} has the ending {path.suffix!r}; archives are .pt (torch.jit.save) and .pt2 (torch.export.save); "
            "weights alone become one by `camserve models export FACTORY --weights FILE`"
        )
    return _ARCHIVES[path.suffix]


def put(
    place: Place, write: Callable[[Path], Path], config: ModelConfig | None, *, told: str, settings: Settings
) -> Account:
    """Puts a version into place after it was loaded and tried as a server would.

    Args:
        place: where it goes.
        write: writes the archive into the folder it is given and returns its path.
        config: the card of a new model; None for the defaults. A model that exists keeps its own.
        told: where the archive comes from, in a sentence for the card.
        settings: device and limits of the trial.

    Raises:
        ValueError: it cannot be written, served, or put there; the text says why.
    """
    if not place.is_new and config is not None:
        raise ValueError(
            f"model {place.name!r} exists, and how it is served is said by {place.folder / CARD_FILE}: edit that if it must "
            "change, and leave such options out; or give another --name"
        )
    with staged(place) as staging:
        path = write(staging.version)
        if place.is_new:
            _write_card(staging, config or ModelConfig(), "", told)
        card = staging.card / CARD_FILE
        served = read_config(card) if card.is_file() else ModelConfig()
        account = check_source(ModelSource(name=place.name, version=place.version, path=path, config=served), settings)
        if account.card is None:
            raise ValueError(f"nothing was added, since it could not be served: {account.error}")
        if place.is_new:
            _write_card(staging, config or ModelConfig(), account.card.default_layer, told)
    return account


def _write_card(staging: Staging, config: ModelConfig, default_layer: str, told: str) -> None:
    text = card_text(config, default_layer=default_layer, told=told, has_labels=bool(config.labels))
    (staging.card / CARD_FILE).write_text(text, encoding="utf-8")
    if config.labels:
        (staging.card / LABELS_FILE).write_text(labels_text(config.labels), encoding="utf-8")

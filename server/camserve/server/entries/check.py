"""Loads the models of a repository one after another, as a server with the same settings would, and tells how each fares.

Arrives: a folder and settings. Leaves: an account of each version, with its card or the reason why it has none. Nothing listens,
nothing is kept. `check_command.py` prints the accounts; `adding.py` asks for one before it lets an archive in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from camserve.server.app import resolve_device
from camserve.server.entries.trial import PassTrial, try_passes
from camserve.server.loading import load_served
from camserve.server.models.card import ModelCard
from camserve.server.models.sources import ModelSource, read_folder
from camserve.server.settings import Settings

__all__ = ["Account", "Finding", "check_all", "check_source", "findings"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One version that lies in a repository, not loaded yet, or a folder that is none.

    Attributes:
        name: of the model.
        version: empty where the folder holds none that could be loaded.
        source: what to load; None where there is nothing.
        error: why there is nothing; empty otherwise.
    """

    name: str
    version: str = ""
    source: ModelSource | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """How one version fared.

    Attributes:
        name: of the model.
        version: likewise.
        card: as a server would tell it; None where it failed.
        passes: what passes took.
        error: why it failed; empty where it works.
    """

    name: str
    version: str
    card: ModelCard | None = None
    passes: tuple[PassTrial, ...] = ()
    error: str = ""


def findings(root: Path, name: str = "") -> list[Finding]:
    """What a server with this repository would load.

    Args:
        root: the repository.
        name: of the only model to look at; empty for all.

    Raises:
        ValueError: there is no such folder, no model in it, or none of that name; the text says what there is.
    """
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder; a model repository holds <name>/model.toml and <name>/<version>/model.pt"
        )
    if (root / "model.toml").is_file():
        raise ValueError(
            f"{root} is the folder of one model; name the repository: camserve models check {root.parent} --name {root.name}"
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = [folder.name for folder in folders]
    if not names:
        raise ValueError(f"{root} holds no models: expected {root}/<name>/model.toml and {root}/<name>/1/model.pt")
    if name and name not in names:
        raise ValueError(f"{root} holds no model {name!r}; it has: {', '.join(names[:20])}")
    return [finding for folder in folders if name in ("", folder.name) for finding in _found_in(folder)]


def _found_in(folder: Path) -> list[Finding]:
    """The versions that the model's policy selects."""
    try:
        wanted = read_folder(folder).wanted
    except ValueError as error:
        return [Finding(name=folder.name, error=str(error))]
    return [Finding(name=source.name, version=source.version, source=source) for source in wanted]


def check_all(found: list[Finding], settings: Settings) -> Iterator[Account]:
    """Loads and tries each in turn; one that fails leaves the others alone.

    Raises:
        ValueError: the settings name a device that is not there.
    """
    for finding in found:
        if finding.source is None:
            yield Account(name=finding.name, version=finding.version, error=finding.error)
        else:
            yield check_source(finding.source, settings)


def check_source(source: ModelSource, settings: Settings) -> Account:
    """Loads one version and runs its passes.

    Raises:
        ValueError: the settings name a device that is not there.
    """
    device = resolve_device(settings.device)
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    try:
        served = load_served(source, settings, device)
        passes = try_passes(served)
    except Exception as error:  # noqa: BLE001 - a model file is foreign code and may raise anything
        return Account(name=source.name, version=source.version, error=str(error) or type(error).__name__)
    return Account(name=source.name, version=source.version, card=served.card, passes=passes)

"""Where a new version goes in a repository, and how it gets there whole: prepared in a hidden folder, then renamed into place.

`adding.py` and `exporting.py` fill the hidden folder. Servers pass over what begins with a dot, so that none ever sees half an
entry, and a command that fails leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from camserve.server.models.sources import is_model_name, version_order

__all__ = ["Place", "Staging", "find_place", "staged"]

_OPTION = {"model": "name", "version": "version"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a version will be.

    Attributes:
        root: the repository.
        name: of the model.
        version: its folder's name.
        is_new: whether the repository has no model of this name yet, so that its card is to be written as well.
    """

    root: Path
    name: str
    version: str
    is_new: bool

    @property
    def folder(self) -> Path:
        """Of the model, with its card."""
        return self.root / self.name


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """Where the files are prepared.

    Attributes:
        card: folder for `model.toml` and what it names; the model's own where it is not new.
        version: folder for the archive.
    """

    card: Path
    version: Path


def find_place(root: Path, name: str, version: str = "") -> Place:
    """Finds the place of a new version: the next number, unless another is asked for.

    Raises:
        ValueError: the name is none, the repository's own folder is not there to be made, or the version exists.
    """
    for what, text in (("model", name), *([("version", version)] if version else [])):
        if not is_model_name(text):
            raise ValueError(
                f"{text!r} is not a {what} name; use letters, digits, '.', '_' and '-', at most 64; set it with --{_OPTION[what]}"
            )
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is not a folder; name the folder of a model repository")
    if not root.parent.is_dir():
        raise ValueError(f"there is no folder {root.parent} in which a repository {root.name} could be made")
    folder = root / name
    versions = (
        sorted((path.name for path in folder.iterdir() if path.is_dir()), key=version_order) if folder.is_dir() else []
    )
    if version in versions:
        raise ValueError(
            f"{folder / version} exists, and nothing is overwritten; leave --version out for {_following(versions)}, "
            "or remove it first"
        )
    return Place(root=root, name=name, version=version or _following(versions), is_new=not folder.exists())


def _following(versions: list[str]) -> str:
    return str(1 + max((int(version) for version in versions if version.isdecimal()), default=0))


@contextlib.contextmanager
def staged(place: Place) -> Iterator[Staging]:
    """Gives a hidden folder to fill; what is in it when the body ends without an error is put into place in one step.

    Raises:
        ValueError: somebody else took the place meanwhile; nothing of theirs is touched.
    """
    place.root.mkdir(exist_ok=True)
    beside = place.root if place.is_new else place.folder
    hidden = beside / f".{place.name}.{place.version}.{secrets.token_hex(4)}"
    version = hidden / place.version if place.is_new else hidden
    version.mkdir(parents=True)
    try:
        yield Staging(card=hidden if place.is_new else place.folder, version=version)
        _write_through(hidden)
        target = place.folder if place.is_new else place.folder / place.version
        try:
            hidden.rename(target)
        except OSError as error:
            if not target.exists():
                raise
            raise ValueError(
                f"{target} was made by somebody else meanwhile, and is left as it is; run this again"
            ) from error
        _write_through_folder(beside)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write_through(folder: Path) -> None:
    """What is renamed into place must be on the disk before its name is."""
    for path in [*folder.rglob("*"), folder]:
        _write_through_folder(path)


def _write_through_folder(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

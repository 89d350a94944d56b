"""Which images a command line means, and what their results are called.

`cli_explain.py` turns its arguments into `ImageFile`s here before anything is sent: folders are searched, globs expanded, and
every image gets a stem of its own below the output folder, so that no result overwrites another's.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

SUFFIXES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
STDIN: Final = "-"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """One image of a command line.

    Attributes:
        path: where it is; "-" means standard input.
        stem: what its results are called below the output folder, unique in the run; sub-folders are kept.
    """

    path: str
    stem: PurePosixPath


def find_images(arguments: Sequence[str], *, excluded: Path | None = None) -> list[ImageFile]:
    """Returns the images that arguments mean, each once, in the order of the arguments.

    Args:
        arguments: files, folders (searched with their sub-folders for image suffixes), globs, or "-". A file is taken whatever
            its suffix, and also when it does not exist: that is told when it is its turn.
        excluded: folder whose files are no inputs: that of an earlier run's results.
    """
    found: dict[str, PurePosixPath] = {}
    for argument in arguments:
        for path, relative in _expand(argument):
            if path != STDIN and excluded is not None and Path(path).resolve().is_relative_to(excluded.resolve()):
                continue
            found.setdefault(path, relative)
    return [ImageFile(path=path, stem=stem) for path, stem in zip(found, _unique(found.values()), strict=True)]


def _expand(argument: str) -> Iterable[tuple[str, PurePosixPath]]:
    """Yields paths, each with the name its result would like to have, suffix and all."""
    folder = Path(argument)
    if argument == STDIN:
        yield STDIN, PurePosixPath("stdin")
    elif folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield str(path), PurePosixPath(path.relative_to(folder).as_posix())
    elif not folder.exists() and glob.has_magic(argument):
        for match in sorted(glob.glob(argument, recursive=True)):  # noqa: PTH207  # The pattern may be absolute.
            yield from [(match, PurePosixPath(Path(match).name))] if Path(match).is_file() else _expand(match)
    else:
        yield argument, PurePosixPath(folder.name)


def _unique(names: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    """Drops suffixes where that leaves names different, and numbers what is still the same.

    Case does not make a difference: some file systems ignore it.
    """
    names = list(names)
    short = collections.Counter(_key(name.with_suffix("")) for name in names)
    wanted = [name.with_suffix("") if short[_key(name.with_suffix(""))] == 1 else name for name in names]
    taken: set[str] = set()
    unique = []
    for name in wanted:
        candidate, number = name, 1
        while _key(candidate) in taken or (number > 1 and candidate in wanted):
            number += 1
            candidate = name.with_name(f"{name.name}-{number}")
        taken.add(_key(candidate))
        unique.append(candidate)
    return unique


def _key(name: PurePosixPath) -> str:
    return name.as_posix().lower()

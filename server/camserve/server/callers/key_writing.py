"""Changes the keys in a file of callers: text in, text out, with whatever people wrote between the entries left as it is.

`command.py` calls it, and replaces the file. What comes out is read again before it is given back.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import re
from collections.abc import Iterator

from camserve.server.callers.caller_file import CallerFile, KeyEntry, read_caller_file

__all__ = ["with_key", "without_keys"]

_HEADER = re.compile(r"^[ \t]*\[", re.MULTILINE)
_KEY_HEADER = re.compile(r"[ \t]*\[\[[ \t]*key[ \t]*\]\]")


def with_key(text: str, entry: KeyEntry) -> str:
    """Adds a key at the end.

    Raises:
        ValueError: the text is no file of callers.
    """
    lines = [
        "[[key]]",
        f"name = {json.dumps(entry.name, ensure_ascii=False)}",
        f'sha256 = "{entry.sha256}"',
        f"roles = {json.dumps(sorted(entry.roles))}",
        *_times(entry),
    ]
    before = f"{text.rstrip()}\n\n" if text.strip() else ""
    return _checked(before + "\n".join(lines) + "\n", [*_keys(text), entry])


def without_keys(text: str, leaving: frozenset[str]) -> str:
    """Takes keys out.

    Args:
        text: of the file.
        leaving: the SHA-256 of each.

    Raises:
        ValueError: the text is no file of callers, or is written so that a key cannot be cut out.
    """
    kept = "".join(block for block in _blocks(text) if not leaving & _digests(block))
    return _checked(kept, [entry for entry in _keys(text) if entry.sha256 not in leaving])


def _blocks(text: str) -> Iterator[str]:
    """Pieces that begin with a header each; comments directly above one belong to it."""
    starts = [0, *(_above(text, match.start()) for match in _HEADER.finditer(text)), len(text)]
    for start, end in itertools.pairwise(starts):
        yield text[start:end]


def _above(text: str, position: int) -> int:
    """Where the comments directly above a line begin."""
    while (line := text[:position].rpartition("\n")[0].rpartition("\n")[2]).lstrip().startswith("#") and position:
        position -= len(line) + 1
    return position


def _digests(block: str) -> set[str]:
    lines = [line for line in block.splitlines() if not line.lstrip().startswith("#")]
    if not lines or not _KEY_HEADER.match(lines[0]):
        return set()
    return {entry.sha256 for entry in _keys(block)}


def _keys(text: str) -> tuple[KeyEntry, ...]:
    return read_caller_file(text.encode()).key


def _checked(text: str, keys: list[KeyEntry]) -> str:
    expected: CallerFile = read_caller_file(text.encode())
    if list(expected.key) != keys:
        raise ValueError("the file is written in a way that cannot be changed from here; please edit it by hand")
    return text


def _times(entry: KeyEntry) -> Iterator[str]:
    for name, moment in (("not_before", entry.not_before), ("expires", entry.expires)):
        if moment is not None:
            yield f"{name} = {moment.astimezone(dt.UTC).isoformat(timespec='seconds').replace('+00:00', 'Z')}"

"""What callers may take of whom the file of callers says so by name; everybody else has what the settings say.

`credentials.py` makes one, and the turnstile asks it for each request: the file may have changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from camserve.server.callers.caller_file import CallerFile, CertificateEntry, KeyEntry
from camserve.server.callers.limits import CallerLimits

__all__ = ["OwnLimits", "limits_by_name"]


def limits_by_name(file: CallerFile, default: CallerLimits) -> Mapping[str, CallerLimits]:
    """Of each caller that the file names; where a name stands more than once, its first entry that says something counts.

    Args:
        file: of callers.
        default: what counts for what an entry leaves out.
    """
    found: dict[str, CallerLimits] = {}
    entries: tuple[KeyEntry | CertificateEntry, ...] = (*file.key, *file.certificate)
    for entry in entries:
        own = {
            name: value
            for name in ("requests_per_second", "burst", "concurrency")
            if (value := getattr(entry, name)) is not None
        }
        if own:
            found.setdefault(entry.caller_name, dataclasses.replace(default, **own))
    return found


class OwnLimits:
    """Tells what a caller may take, by its name.

    Args:
        default: of everybody else.
        file: the file of callers as it is now.
    """

    def __init__(self, default: CallerLimits, file: Callable[[], CallerFile]) -> None:
        self._default = default
        self._file = file
        self._read: CallerFile | None = None
        self._by_name: Mapping[str, CallerLimits] = {}

    def __call__(self, caller: str) -> CallerLimits:
        """Takes a caller's name."""
        file = self._file()
        if file is not self._read:
            self._read, self._by_name = file, limits_by_name(file, self._default)
        return self._by_name.get(caller, self._default)

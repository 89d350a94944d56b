"""What somebody loaded or unloaded by name, which stays so whatever a folder's policy says, and what to serve between the two.

`lifecycle.py` owns it, tells it of each call, and asks it what a folder that changed should come to. It loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from camserve.server.models.sources import ModelFolder, ModelSource, version_order

__all__ = ["ByHand"]


class ByHand:
    """Remembers it, for every model."""

    def __init__(self) -> None:
        self._kept: set[tuple[str, str]] = set()
        self._kept_away: set[tuple[str, str]] = set()

    def ask(self, name: str, version: str) -> None:
        """Somebody wants a version that may have been unloaded by name."""
        self._kept_away.discard((name, version))

    def keep(self, name: str, version: str) -> None:
        """A version was loaded by name."""
        self._kept.add((name, version))

    def keep_away(self, name: str, versions: Iterable[str]) -> None:
        """Versions are unloaded by name."""
        leaving = [(name, version) for version in versions]
        self._kept.difference_update(leaving)
        self._kept_away.update(leaving)

    def leave_to_policy(self, name: str) -> None:
        """A model was asked for without a version: from now on its folder decides again."""
        for by_hand in (self._kept, self._kept_away):
            by_hand.difference_update([key for key in by_hand if key[0] == name])

    def forget(self, name: str, version: str) -> None:
        """A version is gone."""
        self._kept.discard((name, version))
        self._kept_away.discard((name, version))

    def to_load(self, folder: ModelFolder) -> Iterator[ModelSource]:
        """What of a folder should serve, in order of version; what is unloaded while the ones before are loaded is left out."""
        for version in sorted(self._wanted(folder), key=version_order):
            if (folder.name, version) not in self._kept_away:
                yield folder.sources[version]

    def may_stay(self, folder: ModelFolder, *, has_all: bool) -> frozenset[str]:
        """The versions that nothing unloads.

        What is no longer in the folder goes in any case; what the policy drops only when all that it asks for is there.

        Args:
            folder: as it is now.
            has_all: whether all of `to_load` serves.
        """
        return self._wanted(folder) if has_all else frozenset(folder.sources)

    def _wanted(self, folder: ModelFolder) -> frozenset[str]:
        kept = {version for name, version in self._kept if name == folder.name}
        return frozenset(source.version for source in folder.wanted) | (kept & folder.sources.keys())

"""What can be loaded: what the server was given by flags, and what the repository's folder holds whenever it is asked.

`lifecycle.py` asks it before it does anything to a model. Folders may lie on a network, so that they are read elsewhere than on
the event loop. It knows nothing of what is loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from camserve.server.errors import NotFound, Reason, Unsupported
from camserve.server.models.sources import ModelFolder, ModelSource, is_model_name, read_folder

__all__ = ["Stock"]


class Stock:
    """Where a name leads to.

    Args:
        sources: what the server starts with; what has no folder in the repository was given by flags.
        root: the folder of models, or None.
    """

    def __init__(self, sources: Sequence[ModelSource], *, root: Path | None) -> None:
        self._given = {
            (source.name, source.version): source for source in sources if source.folder is None or root is None
        }
        self._root = root

    def given(self, name: str) -> list[ModelSource]:
        """What was given by flags under that name."""
        return [source for (given, _), source in self._given.items() if given == name]

    def is_followed(self, name: str) -> bool:
        """Whether the repository's folder decides about that name, rather than what was given by flags."""
        return self._root is not None and not self.given(name)

    async def source(self, name: str, version: str, *, served_as: str) -> ModelSource:
        """The source of one version, or of that which a label of the folder names.

        Args:
            name: of the model.
            version: a version or a label.
            served_as: the version that is meant where what serves is asked; it finds what was given by flags.

        Raises:
            NotFound: there is no such model or version.
            Unsupported: there is no repository, or its folder is none of a model.
        """
        given = self._given.get((name, served_as))
        if given is not None:
            return given
        folder = await self.folder(name)
        source = folder.sources.get(folder.labels.get(version, version))
        if source is None:
            raise NotFound(
                Reason.VERSION_NOT_FOUND,
                f"the repository has no version {version!r} of model {name!r}; it has: {', '.join(folder.sources)}",
                field="version",
                metadata={"model": name, "version": version},
            )
        return source

    async def folder(self, name: str) -> ModelFolder:
        """What the repository holds of a model.

        Raises:
            NotFound: it has no model of that name.
            Unsupported: there is no repository, or its folder is none of a model.
        """
        if self._root is None:
            known = ", ".join(sorted({given for given, _ in self._given})) or "none"
            raise Unsupported(
                Reason.REPOSITORY_MISSING,
                f"this server has no model repository to load {name!r} from, only what it was started with: {known}; "
                "start it with --models DIR",
                field="model",
                metadata={"model": name, "known": known},
            )
        # A name is never joined to a path before it is known to be one.
        if not is_model_name(name) or not await asyncio.to_thread((self._root / name).is_dir):
            raise NotFound(
                Reason.MODEL_NOT_FOUND,
                f"the repository has no model {name!r}; put it into a folder of that name",
                field="model",
                metadata={"model": name},
            )
        try:
            return await asyncio.to_thread(read_folder, self._root / name)
        except (ValueError, OSError) as error:
            raise Unsupported(Reason.MODEL_LOAD_FAILED, str(error), metadata={"model": name}) from error

    async def has(self, name: str, version: str) -> bool:
        """Whether a version that was served can be loaded again."""
        if (name, version) in self._given:
            return True
        return self._root is not None and await asyncio.to_thread((self._root / name / version).is_dir)

"""Files that are read again when they change. One that is broken changes nothing: what was read before stays.

`credentials.py` makes them, `app.py` lets `follow` run beside the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from camserve.server.callers.unreadable import unreadable
from camserve.server.metrics import Metrics

__all__ = ["Reloaded", "follow"]

_T_co = TypeVar("_T_co", covariant=True)

_log = structlog.get_logger("camserve.callers")
# File systems of a network tell nothing of what others write, nor does a watch of what came just before it: so we look anyway.
_LOOK_SECONDS = 10.0


class Reloaded(Generic[_T_co]):
    """What some files say, together.

    Attributes:
        name: of the setting that names them, for the log and the metric.
        paths: of the files.
        value: what they said when they were last right.
    """

    def __init__(self, name: str, paths: Sequence[Path], read: Callable[..., _T_co]) -> None:
        """Reads the files.

        Args:
            name: see the class.
            paths: likewise.
            read: makes the value of the files' bytes, in the order of the paths; raises ValueError if they are wrong.

        Raises:
            ValueError: one cannot be read, or is wrong.
        """
        self.name = name
        self.paths = tuple(paths)
        self._read = read
        try:
            self._seen: tuple[bytes, ...] | str = self._bytes()
            self.value = read(*self._seen)
        except Exception as error:
            raise ValueError(f"{name}: {self._where(error)}") from error

    def look(self) -> str | None:
        """Reads the files again if they have changed.

        Returns:
            None if nothing has changed since the last look, an empty text if there is a new value, else why there is none.
        """
        try:
            found: tuple[bytes, ...] | str = self._bytes()
        except OSError as error:
            found = unreadable(error)
        if found == self._seen:
            return None
        self._seen = found
        if isinstance(found, str):
            return found
        try:
            self.value = self._read(*found)
        except Exception as error:  # noqa: BLE001 - whatever a file makes of its reader, the next one is read again
            return self._where(error)
        return ""

    def _bytes(self) -> tuple[bytes, ...]:
        return tuple(path.read_bytes() for path in self.paths)

    def _where(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return unreadable(error)
        # Of errors that no reader meant to raise the text is not told: it may hold a piece of the file.
        said = str(error) if isinstance(error, ValueError) else f"cannot be read ({type(error).__name__})"
        return f"{', '.join(map(str, self.paths))}: {said}"


async def follow(files: Sequence[Reloaded[Any]], metrics: Metrics) -> None:
    """Looks at the files whenever something changes beside them, until cancelled.

    Their folders are watched: who replaces a file, as Kubernetes does with those of a secret, changes no file but a name.
    """
    # Imported here: most servers have none of these files, and start without what that needs.
    import watchfiles  # noqa: PLC0415

    for file in files:
        metrics.stale_credentials.labels(file.name).set(0)
    folders = {path.absolute().parent for file in files for path in file.paths}
    while True:
        try:
            async for _ in watchfiles.awatch(
                *folders,
                watch_filter=None,
                recursive=False,
                step=50,
                debounce=200,
                rust_timeout=round(_LOOK_SECONDS * 1000),
                yield_on_timeout=True,
            ):
                await _look(files, metrics)
        except (OSError, RuntimeError) as error:
            _log.error("credentials cannot be watched", error=str(error))
            await asyncio.sleep(_LOOK_SECONDS)
            await _look(files, metrics)


async def _look(files: Sequence[Reloaded[Any]], metrics: Metrics) -> None:
    for file in files:
        complaint = await asyncio.to_thread(file.look)
        if complaint is None:
            continue
        metrics.stale_credentials.labels(file.name).set(1 if complaint else 0)
        if complaint:
            _log.error("credentials not read: those from before stay", setting=file.name, error=complaint)
        else:
            _log.info("credentials read", setting=file.name)

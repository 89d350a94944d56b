"""A whole server on a thread of this process: for `camserve demo`, notebooks and tests that want a real one for a moment.

with BackgroundServer(Settings(listen="127.0.0.1:0"), demo_sources()) as server:
    client = Client(server.target)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Self, TypeVar

from camserve.server.app import App
from camserve.server.logs import configure_logs
from camserve.server.models.repository import ModelState
from camserve.server.models.sources import ModelSource
from camserve.server.settings import Settings

__all__ = ["BackgroundServer"]

_T = TypeVar("_T")


class BackgroundServer:
    """Starts, loads and serves inside `with`; drains on leaving.

    Attributes:
        app: the server; its objects belong to the server's loop.
        target: where to connect, such as `127.0.0.1:40123`, or the Unix socket.
    """

    def __init__(self, settings: Settings, sources: Sequence[ModelSource]) -> None:
        configure_logs(settings.log_format, settings.log_level)
        self.app = App(settings, sources)
        self.target = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="camserve-server", daemon=True)

    def __enter__(self) -> Self:
        """Returns when every model is ready.

        Raises:
            ValueError: a model could not be loaded.
        """
        self._thread.start()
        self.run(self.app.start()).result()
        listen = self.app.settings.listen
        self.target = listen if listen.startswith("unix:") else f"127.0.0.1:{self.app.port}"
        self.run(self.app.load()).result()
        failed = [slot for slot in self.app.repository.slots() if slot.state is ModelState.FAILED]
        if failed:
            self.__exit__(None, None, None)
            raise ValueError("; ".join(f"model {slot.name} could not be loaded: {slot.error}" for slot in failed))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Drains and ends the thread."""
        self.run(self.app.drain()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[object, object, _T]) -> concurrent.futures.Future[_T]:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

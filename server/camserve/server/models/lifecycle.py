"""How models come and go while a server serves: every load, reload and unload, and what is told of them.

`app.py` lets it load what the server starts with, `service.py` hands it LoadModel and UnloadModel, `watching.py` the names of
models whose folder has changed. It alone changes the `Repository`; `stock.py` tells it what there is to load, `by_hand.py` what a
folder should come to. Lives on the event loop; models are loaded in a thread of their own, and warmed up on the device thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Coroutine, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from camserve.server.engine.program import Program
from camserve.server.engine.turns import InTurn
from camserve.server.errors import CamserveError, NotFound, Overloaded, Reason, Unavailable, Unsupported
from camserve.server.models.budget import Budget, Holder
from camserve.server.models.by_hand import ByHand
from camserve.server.models.loading import LoadingThread, OnDevice
from camserve.server.models.memory import give_back
from camserve.server.models.repository import ModelState, Repository, ServedModel
from camserve.server.models.sources import ModelFolder, ModelSource, files_of
from camserve.server.models.stock import Stock

__all__ = ["Lifecycle", "Witness"]

# The device thread may still be at a pass whose callers all left; after so many turns it is not.
_MOST_TURNS = 4


class Witness(Protocol):
    """Who is told of what happens to models, each time before anybody else can act on it."""

    async def ready(self, source: ModelSource, served: ServedModel) -> None:
        """A model answers from now on."""
        ...

    async def failed(self, source: ModelSource, error: Exception) -> None:
        """A model could not be loaded."""
        ...

    async def leaving(self, served: ServedModel) -> None:
        """A model takes no request any more; who holds it for other reasons lets go of it."""
        ...

    async def left(self, name: str, version: str, load_number: int) -> None:
        """Nobody is inside a model any more, and what was remembered of it can go."""
        ...

    async def forgotten(self, name: str) -> None:
        """A version of a model is not listed any more."""
        ...

    def refused(self, name: str, error: Exception) -> None:
        """A folder of the repository is none of a model, or not yet; what serves is left alone."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """What is being done to one version of a model."""

    kind: str
    task: asyncio.Task[Any]


class Lifecycle:
    """Loads and unloads.

    Args:
        repository: that it fills.
        sources: what the server starts with; what none of them has a folder for was given by flags.
        root: the folder of models, or None.
        load: loads one source, in the given thread; its second argument runs pieces of that on the device.
        on_device: runs a piece on the device thread.
        witness: is told.
        budget: of the device's memory.
    """

    def __init__(
        self,
        repository: Repository,
        sources: Sequence[ModelSource],
        *,
        root: Path | None,
        load: Callable[[ModelSource, InTurn], ServedModel],
        on_device: OnDevice,
        witness: Witness,
        budget: Budget,
    ) -> None:
        self._repository = repository
        self._first = list(sources)
        self._stock = Stock(sources, root=root)
        self._by_hand = ByHand()
        self._load_source = load
        self._on_device = on_device
        self._witness = witness
        self._budget = budget
        self._thread = LoadingThread()
        self._numbers = itertools.count(1)
        self._files: dict[tuple[str, str], Hashable] = {}
        self._works: dict[tuple[str, str], _Work] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being loaded."""
        return self._thread.is_idle

    async def start(self) -> None:
        """Loads what the server starts with, one after another; one that fails leaves the others alone."""
        for source in self._first:
            slot = self._repository.slot(source.name, source.version)
            if self._is_closed or slot is None or slot.state is not ModelState.LOADING:
                continue
            with contextlib.suppress(CamserveError):  # Told on its slot.
                await self._loaded(source)

    async def load(self, name: str, version: str = "") -> ServedModel:
        """Loads a version, or what the model's policy asks for; returns when it serves, the newest of several.

        A version that serves already, of files that have not changed, is left alone. Who waits may leave: the loading goes on.

        Raises:
            NotFound: the repository has no such model or version.
            Unsupported: it could not be loaded, and what served before serves on; or there is no repository.
            Overloaded: models may take no more memory.
            Unavailable: the server is shutting down.
        """
        self._check_open()
        if version:
            source = await self._stock.source(name, version, served_as=self._repository.version(name, version))
            self._by_hand.ask(name, source.version)
            one = await self._loaded(source)
            self._by_hand.keep(name, source.version)
            return one
        self._by_hand.leave_to_policy(name)
        if given := self._stock.given(name):
            return (await self._all_loaded(given))[-1]
        folder = await self._stock.folder(name)
        if not self._repository.slots(name):
            self._repository.set_labels(name, folder.labels)
        served = await self._all_loaded(folder.wanted)
        self._repository.set_labels(name, folder.labels)
        await self._drop_others(folder)
        return served[-1]

    async def unload(self, name: str, version: str = "") -> None:
        """Unloads a version, or all; returns when its memory is free. What is unloaded already is left alone.

        Raises:
            NotFound: no such model or version.
            Unavailable: the server is shutting down.
        """
        self._check_open()
        slots = self._repository.slots(name)
        named = self._repository.version(name, version)
        if not slots or (version and named not in {slot.version for slot in slots}):
            self._repository.get(name, version)  # Raises: it knows what there is.
        leaving = [slot.version for slot in slots if not version or slot.version == named]
        self._by_hand.keep_away(name, leaving)
        await self._all(self._unloaded(name, other) for other in leaving)

    async def follow(self, name: str) -> None:
        """Makes it so what the repository's folder of a model says now; what was loaded or unloaded by name stays so.

        Never raises for a model's sake: what cannot be loaded is told on its slot, what cannot even be read in the log.
        """
        if self._is_closed or not self._stock.is_followed(name):
            return
        with contextlib.suppress(Unavailable):
            try:
                folder = await self._stock.folder(name)
            except NotFound:
                await self._all(self._unloaded(name, slot.version) for slot in self._repository.slots(name))
                return
            except Unsupported as error:
                self._witness.refused(name, error)
                return
            await self._follow(folder)

    async def _follow(self, folder: ModelFolder) -> None:
        name = folder.name
        if not self._repository.slots(name):
            self._repository.set_labels(name, folder.labels)
        has_all = True
        for source in self._by_hand.to_load(folder):
            try:
                await self._loaded(source)
            except (Unsupported, Overloaded):
                has_all = False
        if has_all:
            self._repository.set_labels(name, folder.labels)
        staying = self._by_hand.may_stay(folder, has_all=has_all)
        await self._all(
            self._unloaded(name, slot.version)
            for slot in self._repository.slots(name)
            if slot.version not in staying
            and (slot.state is not ModelState.UNLOADED or slot.version not in folder.sources)
        )

    async def close(self) -> None:
        """Stops: what waits is cancelled, what is being loaded is not waited for."""
        self._is_closed = True
        self._thread.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _check_open(self) -> None:
        if self._is_closed:
            raise Unavailable(Reason.DRAINING, "the server is shutting down; send the request to another replica")

    async def _drop_others(self, folder: ModelFolder) -> None:
        """Begins to unload what the policy does not ask for; what is not in the folder either is forgotten afterwards."""
        wanted = {source.version for source in folder.wanted}
        for slot in self._repository.slots(folder.name):
            if slot.version in wanted:
                continue
            if slot.state is not ModelState.UNLOADED:
                self._keep(self._unloaded(folder.name, slot.version))
            elif slot.version not in folder.sources:
                await self._forget(folder.name, slot.version)

    # One thing at a time is done to a version; who asks for what is being done already waits for that.

    async def _loaded(self, source: ModelSource) -> ServedModel:
        work = functools.partial(self._load, source)
        served: ServedModel = await self._joined((source.name, source.version), "load", work)
        return served

    async def _all_loaded(self, sources: Iterable[ModelSource]) -> list[ServedModel]:
        return await self._all(self._loaded(source) for source in sources)

    async def _unloaded(self, name: str, version: str) -> None:
        await self._joined((name, version), "unload", functools.partial(self._unload, name, version))

    async def _joined(self, key: tuple[str, str], kind: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        while (current := self._works.get(key)) is not None and current.kind != kind:
            await asyncio.wait({current.task})
        if current is None:
            self._check_open()
            current = self._works[key] = _Work(kind, self._keep(work()))
            current.task.add_done_callback(lambda _: self._works.pop(key, None))
        try:
            return await asyncio.shield(current.task)
        except asyncio.CancelledError:
            if current.task.cancelled():
                self._check_open()  # Not the caller left: the server ends.
            raise

    @staticmethod
    async def _all(works: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Waits for all of them; then the first error, if there is one, is raised."""
        results = await asyncio.gather(*works, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def _keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Lets it run to its end, whoever waits for it or not."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # Told elsewhere: not lost.
        return task

    async def _load(self, source: ModelSource) -> ServedModel:
        key = (source.name, source.version)
        slot = self._repository.slot(*key)
        before = None if slot is None else slot.served
        try:
            files = await asyncio.to_thread(files_of, source)
            if before is not None and self._files.get(key) == files:
                return before
            self._repository.set_loading(source)
            in_turn = self._thread.in_turn(self._on_device)
            loaded = await self._thread.run(functools.partial(self._load_source, source, in_turn))
        except Exception as error:
            self._check_open()
            self._repository.set_loading(source)
            self._repository.set_failed(source, str(error))
            await self._witness.failed(source, error)
            raise _load_failed(source, error, before) from error
        served = dataclasses.replace(loaded, load_number=next(self._numbers))
        del loaded
        try:
            leaving = self._budget.leaving(self._holders(), *key, served.card.memory_bytes)
        except Overloaded as error:
            self._repository.set_failed(source, error.message)
            await self._witness.failed(source, error)
            raise
        self._files[key] = files
        self._repository.set_ready(served)
        await self._witness.ready(source, served)
        if before is not None:
            self._keep(self._let_go([before]))
        for holder in leaving:
            if (holder.name, holder.version) != key:
                self._keep(self._unloaded(holder.name, holder.version))
        return served

    def _holders(self) -> list[Holder]:
        """Who is in memory and answers."""
        return [
            Holder(
                name=slot.name,
                version=slot.version,
                memory_bytes=slot.served.card.memory_bytes,
                last_seen=slot.served.guests.last_seen,
                inside=slot.served.guests.inside,
            )
            for slot in self._repository.slots()
            if slot.served is not None
        ]

    async def _unload(self, name: str, version: str) -> None:
        served = self._repository.set_leaving(name, version)
        self._files.pop((name, version), None)
        if served is not None:
            leaving = [served]
            del served  # Whoever refers to it keeps it in memory.
            await self._let_go(leaving)
        self._repository.set_unloaded(name, version)
        await self._forget_if_gone(name, version)

    async def _let_go(self, leaving: list[ServedModel]) -> None:
        """Waits until nobody is inside a model, then sees that its memory is free.

        Args:
            leaving: the model, taken out of this list, so that no caller keeps it.
        """
        served = leaving.pop()
        card, load_number = served.card, served.load_number
        program: weakref.ref[Program] = weakref.ref(served.program)
        await self._witness.leaving(served)
        await served.guests.wait_until_empty()
        del served
        # The device thread writes down what a pass took when its answers are already on their way.
        await self._on_device(_nothing)
        await self._witness.left(card.name, card.version, load_number)
        for _ in range(_MOST_TURNS):
            if program() is None:
                break
            await self._on_device(_nothing)
        await asyncio.to_thread(give_back, lambda: program() is None)

    async def _forget_if_gone(self, name: str, version: str) -> None:
        """An unloaded version stays listed as long as it can be loaded again."""
        if not await self._stock.has(name, version):
            await self._forget(name, version)

    async def _forget(self, name: str, version: str) -> None:
        self._repository.forget(name, version)
        self._by_hand.forget(name, version)
        await self._witness.forgotten(name)


def _load_failed(source: ModelSource, error: Exception, before: ServedModel | None) -> CamserveError:
    serves_on = "; what was loaded before serves on" if before is not None else ""
    metadata = {"model": source.name, "version": source.version}
    return Unsupported(
        Reason.MODEL_LOAD_FAILED,
        f"model {source.name!r} version {source.version} could not be loaded: {error}{serves_on}",
        metadata=metadata,
    )


def _nothing() -> None:
    """Runs when the device thread has done with what it was at."""

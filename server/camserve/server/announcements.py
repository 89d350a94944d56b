"""What the rest of a server hears when models come and go: health, metrics, what is known of costs, the compiler, and the log.

`models/lifecycle.py` calls it in the order in which things happen; `app.py` makes it.
"""

from __future__ import annotations

import structlog

from camserve.server.health import Health
from camserve.server.metrics import Metrics
from camserve.server.models.compiling_queue import CompilingQueue
from camserve.server.models.repository import Repository, ServedModel
from camserve.server.models.sources import ModelSource
from camserve.server.queue import DeviceQueue

__all__ = ["Announcements"]

_log = structlog.get_logger("camserve.models")


class Announcements:
    """The `Witness` of a server."""

    def __init__(
        self,
        *,
        repository: Repository,
        health: Health,
        metrics: Metrics,
        queue: DeviceQueue,
        compiling: CompilingQueue,
    ) -> None:
        self._repository = repository
        self._health = health
        self._metrics = metrics
        self._queue = queue
        self._compiling = compiling

    async def ready(self, source: ModelSource, served: ServedModel) -> None:
        """A model answers from now on."""
        card = served.card
        self._metrics.model_ready.labels(card.name, card.version).set(1)
        await self._health.set_model(card.name, is_serving=True)
        _log.info(
            "model ready",
            model=card.name,
            version=card.version,
            kind=card.kind,
            classes=card.class_count,
            default_layer=card.default_layer,
            plan=card.plan.form,
            speedup=round(card.plan.speedup, 2),
            threads=card.plan.threads,
            seconds=round(card.warm_up_seconds, 3),
        )
        if served.pass_model.compiled is not None:
            self._compiling.add(source, served)

    async def failed(self, source: ModelSource, error: Exception) -> None:
        """A model could not be loaded."""
        _log.error("model failed to load", model=source.name, version=source.version, error=str(error))
        slot = self._repository.slot(source.name, source.version)
        if slot is None or slot.served is None:
            self._metrics.model_ready.labels(source.name, source.version).set(0)
        await self._health.set_model(source.name, is_serving=self._repository.answers(source.name))

    async def leaving(self, served: ServedModel) -> None:
        """A model takes no request any more."""
        card = served.card
        await self._health.set_model(card.name, is_serving=self._repository.answers(card.name))
        _log.info("model unloading", model=card.name, version=card.version, requests=served.guests.inside)
        await self._compiling.give_up(served)

    async def left(self, name: str, version: str, load_number: int) -> None:
        """Nobody is inside a model any more."""
        self._queue.forget(name, version, load_number)
        slot = self._repository.slot(name, version)
        if slot is None or slot.served is None:
            self._metrics.forget_version(name, version)
        if not self._repository.answers(name):
            self._metrics.forget_model(name)
        _log.info("model unloaded", model=name, version=version)

    def refused(self, name: str, error: Exception) -> None:
        """A folder of the repository is none of a model, or not yet."""
        _log.warning("folder not served", model=name, error=str(error))

    async def forgotten(self, name: str) -> None:
        """A version of a model is not listed any more."""
        if not self._repository.slots(name):
            await self._health.forget_model(name)

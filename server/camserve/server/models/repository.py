"""The models a server holds: what is loading, ready or failed. Owned by the event loop; `app.py` fills it, servicers read it."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Sequence

from camserve.server.engine.passes import PassModel
from camserve.server.engine.program import Program
from camserve.server.errors import NotFound, Reason, Unavailable
from camserve.server.models.card import ModelCard
from camserve.server.models.sources import ModelSource, version_order

__all__ = ["CostSample", "ModelState", "Repository", "ServedModel", "Slot"]

# A name may be as long as a message; finding near ones takes time that grows with it, and this is the event loop.
_COMPARED_CHARACTERS = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CostSample:
    """What one pass took at warm-up.

    Attributes:
        depth: as in `engine.effort.Effort`.
        rows: of the pass.
        seconds: device time, maps included.
    """

    depth: int
    rows: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that answers: its card, what the device thread needs to run it, and what its passes took at warm-up."""

    card: ModelCard
    pass_model: PassModel
    costs: tuple[CostSample, ...] = ()

    @property
    def program(self) -> Program:
        """The program; device thread only."""
        return self.pass_model.program


class ModelState(enum.StrEnum):
    """Whether a model answers."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclasses.dataclass(slots=True, kw_only=True)
class Slot:
    """One version of one model and how it fares."""

    name: str
    version: str
    state: ModelState = ModelState.LOADING
    served: ServedModel | None = None
    error: str = ""


class Repository:
    """Looks models up by name and version.

    Raises:
        ValueError: two sources have the same name and version.
    """

    def __init__(self, sources: Sequence[ModelSource]) -> None:
        self._slots: dict[tuple[str, str], Slot] = {}
        for source in sources:
            slot = Slot(name=source.name, version=source.version)
            if self._slots.setdefault((source.name, source.version), slot) is not slot:
                raise ValueError(f"model {source.name!r} version {source.version} is given twice; name one differently")

    def slots(self) -> list[Slot]:
        """All slots by name, then version, the newest last."""
        return sorted(self._slots.values(), key=lambda slot: (slot.name, version_order(slot.version)))

    def hooks(self) -> int:
        """How many hooks are on the modules of all models right now; any thread may ask."""
        return sum(slot.served.pass_model.program.hooks for slot in self.slots() if slot.served is not None)

    def set_ready(self, served: ServedModel) -> None:
        """A model answers from now on."""
        slot = self._slots[served.card.name, served.card.version]
        slot.state, slot.served, slot.error = ModelState.READY, served, ""

    def set_failed(self, source: ModelSource, error: str) -> None:
        """A model could not be loaded."""
        slot = self._slots[source.name, source.version]
        slot.state, slot.error = ModelState.FAILED, error

    def get(self, name: str, version: str = "") -> ServedModel:
        """Finds a model that answers; an empty version takes the newest.

        Raises:
            NotFound: no such model or version; the text lists what there is.
            Unavailable: it exists but is loading or failed.
        """
        versions = [slot for slot in self.slots() if slot.name == name]
        if not versions:
            names = sorted({slot.name for slot in self.slots()})
            near = difflib.get_close_matches(name[:_COMPARED_CHARACTERS], names, n=1)
            hint = f"; did you mean {near[0]!r}? Known models:" if near else "; known models:"
            raise NotFound(
                Reason.MODEL_NOT_FOUND,
                f"model {name!r} is not on this server{hint} {', '.join(names[:20]) or 'none'}",
                field="model",
                metadata={"model": name},
            )
        if version:
            chosen = next((slot for slot in versions if slot.version == version), None)
            if chosen is None:
                known = ", ".join(slot.version for slot in versions)
                raise NotFound(
                    Reason.VERSION_NOT_FOUND,
                    f"model {name!r} has no version {version!r}; it has: {known}",
                    field="version",
                    metadata={"model": name, "version": version},
                )
        else:
            ready = [slot for slot in versions if slot.state is ModelState.READY]
            chosen = (ready or versions)[-1]
        if chosen.served is None:
            said = f"failed to load: {chosen.error}" if chosen.state is ModelState.FAILED else "is still loading"
            raise Unavailable(
                Reason.MODEL_NOT_READY,
                f"model {name!r} version {chosen.version} {said}",
                metadata={"model": name, "version": chosen.version, "state": chosen.state},
                retry_after_seconds=None if chosen.state is ModelState.FAILED else 1.0,
            )
        return chosen.served

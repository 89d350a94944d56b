"""The models a server knows: what is loading, ready, failed or unloaded. Owned by the event loop; `lifecycle.py` fills it.

Servicers and the pipeline find in it who answers a request. Nothing here waits, loads or frees anything.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from camserve.server.engine.passes import PassModel
from camserve.server.engine.program import Program
from camserve.server.errors import NotFound, Reason, Unavailable
from camserve.server.models.card import ModelCard
from camserve.server.models.guests import Guests
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
    """A model that answers.

    Attributes:
        card: what callers see of it.
        pass_model: what the device thread needs to run it.
        costs: what its passes took at warm-up.
        load_number: tells it from what the same name and version was before it was loaded anew; rows of the two share no pass.
        guests: requests inside.
    """

    card: ModelCard
    pass_model: PassModel
    costs: tuple[CostSample, ...] = ()
    load_number: int = 0
    guests: Guests = dataclasses.field(default_factory=Guests, compare=False)

    @property
    def program(self) -> Program:
        """The program; device thread only."""
        return self.pass_model.program


class ModelState(enum.StrEnum):
    """Whether a model answers."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"


@dataclasses.dataclass(slots=True, kw_only=True)
class Slot:
    """One version of one model and how it fares.

    Attributes:
        name: of the model.
        version: of the model.
        state: whether it answers.
        served: what answers; None unless ready.
        error: why it failed; of a ready one, why it could not be loaded anew.
    """

    name: str
    version: str
    state: ModelState = ModelState.LOADING
    served: ServedModel | None = None
    error: str = ""


class Repository:
    """Looks models up by name and version, or a label of one.

    Args:
        sources: that are going to be loaded.

    Raises:
        ValueError: two sources have the same name and version.
    """

    def __init__(self, sources: Iterable[ModelSource]) -> None:
        self._slots: dict[tuple[str, str], Slot] = {}
        self._labels: dict[str, Mapping[str, str]] = {}
        for source in sources:
            if (source.name, source.version) in self._slots:
                raise ValueError(f"model {source.name!r} version {source.version} is given twice; name one differently")
            self.set_loading(source)
            self._labels[source.name] = source.config.versions.labels

    def slots(self, name: str | None = None) -> list[Slot]:
        """All slots, or those of one name, by name, then version, the newest last."""
        found = (slot for slot in self._slots.values() if name in (None, slot.name))
        return sorted(found, key=lambda slot: (slot.name, version_order(slot.version)))

    def slot(self, name: str, version: str) -> Slot | None:
        """One slot, or None."""
        return self._slots.get((name, version))

    def labels(self, name: str) -> Mapping[str, str]:
        """Versions by label."""
        return self._labels.get(name, MappingProxyType({}))

    def labels_of(self, name: str, version: str) -> list[str]:
        """The labels of one version."""
        return [label for label, labelled in self.labels(name).items() if labelled == version]

    def set_labels(self, name: str, labels: Mapping[str, str]) -> None:
        """From now on requests may name versions so."""
        self._labels[name] = labels

    def set_loading(self, source: ModelSource) -> None:
        """A model is being loaded; if it answers, it goes on doing so meanwhile."""
        slot = self._slots.setdefault((source.name, source.version), Slot(name=source.name, version=source.version))
        if slot.served is None:
            slot.state, slot.error = ModelState.LOADING, ""

    def hooks(self) -> int:
        """How many hooks are on the modules of all models right now; any thread may ask."""
        answering = [slot.served for slot in tuple(self._slots.values())]  # Models come and go meanwhile.
        return sum(served.program.hooks for served in answering if served is not None)

    def set_ready(self, served: ServedModel) -> None:
        """A model answers from now on."""
        slot = self._slots[served.card.name, served.card.version]
        slot.state, slot.served, slot.error = ModelState.READY, served, ""

    def set_failed(self, source: ModelSource, error: str) -> None:
        """A model could not be loaded; if it answered before, it goes on doing so."""
        slot = self._slots[source.name, source.version]
        slot.error = error
        if slot.served is None:
            slot.state = ModelState.FAILED

    def set_card(self, served: ServedModel, card: ModelCard) -> None:
        """More is known of a model, if it still is the one that answers."""
        slot = self.slot(card.name, card.version)
        if slot is not None and slot.served is not None and slot.served.load_number == served.load_number:
            slot.served = dataclasses.replace(slot.served, card=card)

    def set_leaving(self, name: str, version: str) -> ServedModel | None:
        """No request gets in any more; returns what answered so far, if anything did."""
        slot = self._slots[name, version]
        served, slot.served, slot.error = slot.served, None, ""
        slot.state = ModelState.UNLOADED if served is None else ModelState.UNLOADING
        return served

    def set_unloaded(self, name: str, version: str) -> None:
        """A model is no longer in memory."""
        slot = self._slots[name, version]
        slot.state, slot.served, slot.error = ModelState.UNLOADED, None, ""

    def forget(self, name: str, version: str) -> None:
        """A model is neither in memory nor in the repository any more."""
        del self._slots[name, version]
        if not self.slots(name):
            self._labels.pop(name, None)

    def answers(self, name: str) -> bool:
        """Whether any version of a model does."""
        return any(slot.served is not None for slot in self.slots(name))

    def troubles(self, card: ModelCard) -> list[str]:
        """What a reader of a card should know of other loads of its model: those that failed."""
        told = []
        for slot in self.slots(card.name):
            if slot.error and slot.version == card.version:
                told.append(
                    f"its files have changed and could not be loaded: {slot.error}; what was loaded before serves on"
                )
            elif slot.error:
                told.append(f"version {slot.version} could not be loaded: {slot.error}")
        return told

    def version(self, name: str, version: str) -> str:
        """The version that a request means: one, or what a label names."""
        return self.labels(name).get(version, version)

    def get(self, name: str, version: str = "") -> ServedModel:
        """Finds a model that answers.

        Args:
            name: of the model.
            version: of the model, or a label; empty takes the newest that is ready.

        Raises:
            NotFound: no such model or version; the text lists what there is. Or it was unloaded.
            Unavailable: it exists but is loading or failed.
        """
        slots = self.slots(name)
        if not slots:
            raise self._unknown_name(name)
        if version:
            named = self.version(name, version)
            chosen = next((slot for slot in slots if slot.version == named), None)
            if chosen is None:
                raise _unknown_version(name, version, named, slots)
        else:
            in_memory = [slot for slot in slots if slot.state not in _UNLOADED]
            ready = [slot for slot in slots if slot.state is ModelState.READY]
            chosen = (ready or in_memory or slots)[-1]
        if chosen.served is None:
            raise _silent(chosen, slots)
        return chosen.served

    def _unknown_name(self, name: str) -> NotFound:
        names = sorted({slot.name for slot in self.slots()})
        near = difflib.get_close_matches(name[:_COMPARED_CHARACTERS], names, n=1)
        hint = f"; did you mean {near[0]!r}? Known models:" if near else "; known models:"
        return NotFound(
            Reason.MODEL_NOT_FOUND,
            f"model {name!r} is not on this server{hint} {', '.join(names[:20]) or 'none'}",
            field="model",
            metadata={"model": name},
        )


_UNLOADED = (ModelState.UNLOADING, ModelState.UNLOADED)


def _unknown_version(name: str, version: str, named: str, slots: Sequence[Slot]) -> NotFound:
    known = ", ".join(slot.version for slot in slots)
    said = f"has no version {version!r}"
    if named != version:
        said = f"has no version {named!r}, which the label {version!r} names"
    return NotFound(
        Reason.VERSION_NOT_FOUND,
        f"model {name!r} {said}; it has: {known}",
        field="version",
        metadata={"model": name, "version": version},
    )


def _silent(slot: Slot, slots: Sequence[Slot]) -> NotFound | Unavailable:
    """Why a version does not answer."""
    metadata = {"model": slot.name, "version": slot.version, "state": slot.state}
    if slot.state in _UNLOADED:
        ready = ", ".join(other.version for other in slots if other.served is not None)
        others = f"; versions that answer: {ready}" if ready else ""
        return NotFound(
            Reason.MODEL_UNLOADED,
            f"model {slot.name!r} version {slot.version} was unloaded; LoadModel brings it back{others}",
            field="model",
            metadata=metadata,
        )
    said = f"failed to load: {slot.error}" if slot.state is ModelState.FAILED else "is still loading"
    return Unavailable(
        Reason.MODEL_NOT_READY,
        f"model {slot.name!r} version {slot.version} {said}",
        metadata=metadata,
        retry_after_seconds=None if slot.state is ModelState.FAILED else 1.0,
    )

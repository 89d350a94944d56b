"""How much memory models may take on their device, and who has to go for another one. Pure; `lifecycle.py` asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from camserve.server.errors import Overloaded, Reason

__all__ = ["Budget", "Holder"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A model in memory.

    Attributes:
        name: of the model.
        version: of the model.
        memory_bytes: that it takes.
        last_seen: monotonic seconds at which a request last came or left.
        inside: requests.
    """

    name: str
    version: str
    memory_bytes: int
    last_seen: float
    inside: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What models may take.

    Attributes:
        max_bytes: of all together; 0 for no limit.
        may_unload: whether models that nobody is inside go for another one.
    """

    max_bytes: int = 0
    may_unload: bool = False

    def leaving(self, holders: Sequence[Holder], name: str, version: str, memory_bytes: int) -> list[Holder]:
        """Who has to go so that a model of this size fits: those that were not used for longest, nobody with requests inside.

        Raises:
            Overloaded: it cannot fit; the text says who holds what.
        """
        if not self.max_bytes:
            return []
        excess = sum(holder.memory_bytes for holder in holders) + memory_bytes - self.max_bytes
        going: list[Holder] = []
        idle = [holder for holder in holders if self.may_unload and not holder.inside]
        for holder in sorted(idle, key=lambda holder: holder.last_seen):
            if excess <= 0:
                break
            going.append(holder)
            excess -= holder.memory_bytes
        if excess > 0:
            raise self._refusal(holders, name, version, memory_bytes)
        return going

    def _refusal(self, holders: Sequence[Holder], name: str, version: str, memory_bytes: int) -> Overloaded:
        held = ", ".join(
            f"{holder.name} {holder.version} {_mebibytes(holder.memory_bytes)}"
            for holder in sorted(holders, key=lambda holder: -holder.memory_bytes)
        )
        advice = "unload one, raise max_model_bytes, or set unload_idle_models"
        if self.may_unload:
            advice = "the others are in use, or do not free enough: unload one, or raise max_model_bytes"
        return Overloaded(
            Reason.MODEL_MEMORY_EXHAUSTED,
            f"model {name!r} version {version} takes {_mebibytes(memory_bytes)}, and models may take "
            f"{_mebibytes(self.max_bytes)} together, of which are held: {held or 'none'}; {advice}",
            metadata={
                "model": name,
                "version": version,
                "bytes": memory_bytes,
                "limitBytes": self.max_bytes,
                "held": held,
            },
        )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"

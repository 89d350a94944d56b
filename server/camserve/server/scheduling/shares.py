"""Who has had how much of the device, and so who is due: lanes by weight, within a lane passes and chunks, and its callers.

An account counts device-seconds, divided by the owner's weight, above a floor that rises with what is served: start-time fair
queueing (Goyal, Vin and Cheng, 1996). Whoever waits and has had least is due. Whoever comes back after an absence, or for the
first time, starts at the floor: nothing is saved up by being away. Two who both wait therefore never drift further apart than
one pass or chunk of each.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Generic, TypeVar

from camserve.server.jobs import Lane

__all__ = ["PASS_WEIGHT", "Account", "Charge", "Shares"]

_K = TypeVar("_K", bound=Hashable)

PASS_WEIGHT = 3.0
"""Passes get so much of a lane for each part that chunks of amplified work get, while both wait."""

# Callers beyond the floor that are remembered; those who had least of it are forgotten first.
_MOST_REMEMBERED = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Account(Generic[_K]):
    """What each has had.

    Attributes:
        used: seconds over weight, of those above the floor.
        floor: what everybody else counts as having had.
    """

    used: Mapping[_K, float] = dataclasses.field(default_factory=dict)
    floor: float = 0.0

    def standing(self, who: _K) -> float:
        """What somebody counts as having had; the least is due."""
        return max(self.used.get(who, self.floor), self.floor)

    def charged(
        self, amounts: Mapping[_K, float], present: Iterable[_K] = (), ceilings: Mapping[_K, float] | None = None
    ) -> Account[_K]:
        """The account after a pass.

        Args:
            amounts: seconds over weight by owner; negative to correct what was charged too much.
            present: everybody who waited when the pass was chosen, those who got it among them; the floor rises to the least.
            ceilings: no further than this above the floor, for some.
        """
        floor = max(self.floor, min((self.standing(who) for who in present), default=self.floor))
        used = dict(self.used)
        for who, amount in amounts.items():
            before = self.standing(who)
            after = before + amount
            if ceilings is not None and who in ceilings:
                after = max(before, min(after, floor + ceilings[who]))
            used[who] = after
        used = {who: value for who, value in used.items() if value > floor}
        if len(used) > _MOST_REMEMBERED:
            used = dict(heapq.nlargest(_MOST_REMEMBERED, used.items(), key=lambda item: item[1]))
        return Account(used, floor)


@dataclasses.dataclass(frozen=True, slots=True)
class Charge:
    """What one caller of one lane pays for a pass or a chunk.

    Attributes:
        lane: whose share it comes from.
        caller: likewise, within the lane.
        is_chunk: likewise: passes and chunks of amplified work share a lane by weight.
        part: of the whole pass, 0 to 1.
        is_rider: the lane was not at its turn, and free rows were filled with it.
    """

    lane: Lane
    caller: str
    is_chunk: bool
    part: float
    is_rider: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """All accounts; a value, replaced after each decision."""

    lanes: Account[Lane] = dataclasses.field(default_factory=Account)
    classes: Mapping[Lane, Account[bool]] = dataclasses.field(default_factory=dict)
    callers: Mapping[Lane, Account[str]] = dataclasses.field(default_factory=dict)

    def of_class(self, lane: Lane) -> Account[bool]:
        """Of passes (False; seconds over their weight) and chunks (True) within a lane."""
        return self.classes.get(lane) or Account()

    def of_callers(self, lane: Lane) -> Account[str]:
        """Of the callers within a lane."""
        return self.callers.get(lane) or Account()

    def charged(
        self,
        charges: Sequence[Charge],
        seconds: float,
        weights: Mapping[Lane, float],
        *,
        present: Mapping[Lane, tuple[Collection[bool], Collection[str]]] = MappingProxyType({}),
        rider_seconds: float | None = None,
    ) -> Shares:
        """The accounts after a pass or chunk of that many seconds; negative ones take back what was charged too much.

        Args:
            charges: who pays which part.
            seconds: of the device.
            weights: of the lanes.
            present: by lane that waited when it was chosen, its classes and its callers that did.
            rider_seconds: a lane that rides along gets no further ahead than so many of its own seconds; None for no limit.
        """
        lanes: dict[Lane, float] = {}
        classes: dict[Lane, dict[bool, float]] = {}
        callers: dict[Lane, dict[str, float]] = {}
        ceilings: dict[Lane, float] = {}
        for charge in charges:
            lane, amount = charge.lane, charge.part * seconds
            lanes[lane] = lanes.get(lane, 0.0) + amount / weights[lane]
            of_class = classes.setdefault(lane, {})
            paid = amount if charge.is_chunk else amount / PASS_WEIGHT
            of_class[charge.is_chunk] = of_class.get(charge.is_chunk, 0.0) + paid
            of_caller = callers.setdefault(lane, {})
            of_caller[charge.caller] = of_caller.get(charge.caller, 0.0) + amount
            if charge.is_rider and rider_seconds is not None:
                ceilings[lane] = rider_seconds / weights[lane]
        nobody: tuple[Collection[bool], Collection[str]] = ((), ())
        return Shares(
            self.lanes.charged(lanes, present, ceilings),
            {
                **self.classes,
                **{
                    lane: self.of_class(lane).charged(amounts, present.get(lane, nobody)[0])
                    for lane, amounts in classes.items()
                },
            },
            {
                **self.callers,
                **{
                    lane: self.of_callers(lane).charged(amounts, present.get(lane, nobody)[1])
                    for lane, amounts in callers.items()
                },
            },
        )

"""When a server explains without being asked: what a rule's condition is told, and what a rule means for one request.

`rules/` makes both; the engine is only asked, through them, whether a spec is due.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

from camserve.server.errors import CamserveError
from camserve.server.jobs.readings import Reading
from camserve.server.jobs.words import Lane

__all__ = ["Circumstances", "Condition", "RuleUse"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a condition may ask about the request.

    Attributes:
        model: that answers.
        version: its version.
        lane: how urgent the request is.
        labels: the caller's own strings.
        asked: whether the caller asked for explanations.
    """

    model: str
    version: str
    lane: Lane
    labels: Mapping[str, str]
    asked: bool


Condition: TypeAlias = Callable[[Reading, Circumstances], bool]
"""Whether a rule holds for a row; raises CamserveError where that cannot be told."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuleUse:
    """A rule and one request.

    Attributes:
        name: of the rule.
        spec_index: of the spec it adds to the request; None where its sample leaves the request out.
        condition: over the prediction; None when it always holds.
        circumstances: what the condition is told of the request.
        obstacle: why the spec cannot be made for this input whatever the model says, such as an overlay on a tensor.
    """

    name: str
    spec_index: int | None
    circumstances: Circumstances
    condition: Condition | None = None
    obstacle: CamserveError | None = None

    def is_due(self, reading: Reading) -> bool:
        """Whether the spec is to be made.

        Raises:
            CamserveError: the condition cannot be evaluated, or it holds and the spec cannot be made.
        """
        is_met = self.condition is None or self.condition(reading, self.circumstances)
        if is_met and self.obstacle is not None:
            raise self.obstacle
        return is_met

"""Whether a request can still be in time: what lies before it and what it takes itself, judged in the request's favour.

`queue.py` makes a `Forecast` from its backlog, the door refuses by it. It is a lower bound as far as one can be had: what is not
known counts as nothing, work of later deadlines does not come first, lanes above get no more than their weight, and
what is left is still divided by a doubt. A request that is let in and comes too late costs its own work; one that is refused
without need costs an answer.
"""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Forecast"]

# Estimates may be so many times too high before anybody is refused without need.
_DOUBT = 1.5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a request would find past the door.

    Attributes:
        queued_seconds: predicted device time of all that waits in its lane and those above, the rest of what runs included.
        own_seconds: predicted of itself alone; 0 where too little is known to refuse anybody by it.
        ahead_seconds: of `queued_seconds`, what must run before it.
    """

    queued_seconds: float = 0.0
    own_seconds: float = 0.0
    ahead_seconds: float = 0.0

    def is_hopeless(self, remaining: float) -> bool:
        """Whether the request would be too late even on an idle server."""
        return self.own_seconds / _DOUBT > remaining

    def lateness(self, remaining: float) -> float:
        """By how much, at least, it would be too late; 0 or less if it may be in time."""
        return (self.ahead_seconds + self.own_seconds) / _DOUBT - remaining if math.isfinite(remaining) else -math.inf

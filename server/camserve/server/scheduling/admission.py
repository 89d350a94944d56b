"""Whether a request can still be in time: what lies before it and what it takes itself, judged in the request's favour.

`queue.py` makes a `Forecast` from its backlog, the door refuses by it. What is not known counts as nothing, work of later
deadlines does not come first, and lanes above get no more than their weight. What lies ahead is the sum of many estimates, whose
errors even out; what the request takes itself is one, and is divided by a doubt. Who is let in and comes too late costs
the work and the time of those who wait behind; who is refused without need costs an answer.
"""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Forecast"]

# The estimate of one request may be so many times too high before anybody is refused without need.
_DOUBT = 1.5
# What lies ahead takes a little longer than passes alone: answers are made and sent meanwhile.
_FRICTION = 1.1


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
        """By how much it would probably be too late; 0 or less if it may be in time."""
        if not math.isfinite(remaining):
            return -math.inf
        return _FRICTION * self.ahead_seconds + self.own_seconds / _DOUBT - remaining

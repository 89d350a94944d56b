"""How long before a deadline an answer must be on its way, if it is to arrive: for the device thread, and for what rules add."""

from __future__ import annotations

from typing import Final

from camserve.server.jobs import Job

__all__ = ["last_call_seconds"]

# A tenth of the time that the caller gave, within bounds: what is left has still to be encoded and sent.
_SHARE: Final = 0.1
_SHORTEST_SECONDS: Final = 0.05
_LONGEST_SECONDS: Final = 0.25


def last_call_seconds(job: Job) -> float:
    """For a job with a deadline; 0 for one without."""
    if job.deadline is None:
        return 0.0
    return min(max(_SHARE * (job.deadline - job.received_at), _SHORTEST_SECONDS), _LONGEST_SECONDS)

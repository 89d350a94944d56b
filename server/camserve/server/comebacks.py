"""When somebody who was refused for want of room should come back: what the door and the turnstile put into RetryInfo."""

from __future__ import annotations

__all__ = ["LONGEST_RETRY_SECONDS", "SHORTEST_RETRY_SECONDS", "within_reason"]

# A refused caller should not come back before the queue has moved, nor wait longer than a batch job would.
SHORTEST_RETRY_SECONDS = 0.05
LONGEST_RETRY_SECONDS = 10.0


def within_reason(seconds: float) -> float:
    """An estimate in seconds, neither so short that nothing will have changed nor so long that nobody waits."""
    return min(max(seconds, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)

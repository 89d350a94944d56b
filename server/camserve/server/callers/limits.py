"""How often a caller may ask: a token bucket, a pure function of the limits and the time.

`turnstile.py` keeps a `Bucket` for each caller, and hands in the clock. Nothing here waits.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Bucket", "CallerLimits"]

# Of a request: what rounding may take from one that is due, also by a clock that has counted for years.
_HAIR = 1e-3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallerLimits:
    """What one caller may take; 0 is no limit.

    Attributes:
        requests_per_second: in the long run.
        burst: how many at once after a pause; 0 for as many as a second brings, at least one.
        concurrency: under way at the same time.
    """

    requests_per_second: float = 0.0
    burst: int = 0
    concurrency: int = 0

    @property
    def tokens(self) -> float:
        """What a full bucket holds; at least one."""
        return float(self.burst or max(self.requests_per_second, 1.0))


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """What a caller has used of its allowance; of nobody more than that need be remembered.

    Attributes:
        missing: requests that a full bucket had more.
        at: monotonic seconds of that moment.
    """

    missing: float
    at: float

    def full_at(self, limits: CallerLimits) -> float:
        """When nothing is missing any more; from then on the caller is as one that never came."""
        return self.at + self.missing / limits.requests_per_second

    def wait(self, now: float, limits: CallerLimits, count: int = 1) -> float:
        """Seconds until the next request, or so many at once, would be let in; 0 if it is now."""
        wanting = self._missing(now, limits) + count - limits.tokens
        return wanting / limits.requests_per_second if wanting > _HAIR else 0.0

    def taken(self, now: float, limits: CallerLimits, count: int = 1) -> Bucket:
        """What has been used when a request, or so many at once, are let in."""
        return Bucket(self._missing(now, limits) + count, now)

    def _missing(self, now: float, limits: CallerLimits) -> float:
        return max(self.missing - (now - self.at) * limits.requests_per_second, 0.0)

"""Where each caller is counted: how many of its requests are under way, and how often it asks.

`interceptors.py` sends every call that asks a model through it before its message is parsed; the handler of a stream that carries
many requests does so for each of them. Lives on the event loop; no locks.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping

from camserve.server.callers.limits import Bucket, CallerLimits
from camserve.server.comebacks import within_reason
from camserve.server.errors import Overloaded, Reason
from camserve.server.metrics import Metrics

__all__ = ["Turnstile"]

# Callers whose buckets are not full. Beyond that those who are nearest to it are forgotten: they gain the least by it.
_MOST_REMEMBERED = 4096


class Turnstile:
    """Counts callers, and forgets those who are not inside and have their full allowance.

    Args:
        limits_of: what a caller may take, by its name; asked for each request, so that it may change.
        metrics: where refusals are counted.
        clock: monotonic seconds.
    """

    def __init__(
        self, limits_of: Callable[[str], CallerLimits], metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits_of = limits_of
        self._metrics = metrics
        self._clock = clock
        self._inside: dict[str, int] = {}
        self._buckets: dict[str, Bucket] = {}
        self._sweep_at = _MOST_REMEMBERED // 4
        self._recent_seconds = 0.1

    @property
    def remembered(self) -> int:
        """How many callers anything is kept of."""
        return len(self._inside.keys() | self._buckets.keys())

    @contextlib.contextmanager
    def request(self, caller: str, *, rows: int = 1, counted: int = 0) -> Iterator[None]:
        """Counts one request of a caller for the length of a `with` block: each of its rows, all of them or none.

        Args:
            caller: its name.
            rows: how many requests it counts as.
            counted: how many of them are counted already, by the call that brought it.

        Raises:
            Overloaded: it has too many under way, or asks too often; with the time to come back, unless it asks for more rows
                at once than it may ever have.
        """
        limits, now, more = self._limits_of(caller), self._clock(), rows - counted
        if not more:
            yield
            return
        self._refuse_if_crowded(caller, limits, rows, more)
        self._refuse_if_too_often(caller, limits, now, rows, more)
        self._inside[caller] = self._inside.get(caller, 0) + more
        try:
            yield
        finally:
            self._recent_seconds += 0.1 * (self._clock() - now - self._recent_seconds)
            if self._inside[caller] == more:
                del self._inside[caller]
            else:
                self._inside[caller] -= more

    def _refuse_if_crowded(self, caller: str, limits: CallerLimits, rows: int, more: int) -> None:
        inside = self._inside.get(caller, 0)
        if not limits.concurrency or inside + more <= limits.concurrency:
            return
        facts = {"requests": inside, "limit": limits.concurrency, "setting": "caller_concurrency"}
        if rows > limits.concurrency:
            raise self._never(Reason.TOO_MANY_CONCURRENT, rows, limits.concurrency, facts)
        self._metrics.rejected.labels(Reason.TOO_MANY_CONCURRENT).inc()
        # As at the door: the average stay is what a newcomer would wait.
        retry = within_reason(self._recent_seconds)
        raise Overloaded(
            Reason.TOO_MANY_CONCURRENT,
            f"this caller has {inside} requests under way, and may have {limits.concurrency} (caller_concurrency); wait for "
            f"answers before asking more, or try again in {retry:.2f} s",
            metadata={**facts, "retrySeconds": f"{retry:.3f}"},
            retry_after_seconds=retry,
        )

    def _refuse_if_too_often(self, caller: str, limits: CallerLimits, now: float, rows: int, more: int) -> None:
        if not limits.requests_per_second:
            return
        bucket = self._buckets.get(caller, Bucket(0.0, now))
        if bucket.wait(now, limits, more):
            facts = {
                "requestsPerSecond": f"{limits.requests_per_second:g}",
                "burst": f"{limits.tokens:g}",
                "setting": "caller_requests_per_second",
            }
            if rows > limits.tokens:
                raise self._never(Reason.RATE_LIMITED, rows, int(limits.tokens), {**facts, "setting": "caller_burst"})
            self._metrics.rejected.labels(Reason.RATE_LIMITED).inc()
            # Who comes back brings all of it again, also what was counted.
            wait = bucket.wait(now, limits, rows)
            raise Overloaded(
                Reason.RATE_LIMITED,
                f"this caller may ask {limits.requests_per_second:g} times a second (caller_requests_per_second) and, after a "
                f"pause, {limits.tokens:g} times at once (caller_burst); try again in {wait:.2f} s",
                metadata={**facts, "retrySeconds": f"{wait:.3f}"},
                retry_after_seconds=wait,
            )
        self._buckets[caller] = bucket.taken(now, limits, more)
        if len(self._buckets) > self._sweep_at:
            self._sweep(now)

    def _never(self, reason: Reason, rows: int, most: int, facts: Mapping[str, object]) -> Overloaded:
        """What refuses a batch that this caller could not send at any time, so that nobody waits for it."""
        self._metrics.rejected.labels(reason).inc()
        return Overloaded(
            reason,
            f"this request counts as {rows}, one for each row, and this caller may have {most} at once ({facts['setting']}); "
            f"send at most {most} rows in one request",
            metadata={**facts, "rows": rows},
        )

    def _sweep(self, now: float) -> None:
        """Forgets who has its full allowance, at a cost that each newcomer has paid its part of."""
        full_at = {caller: self._full_at(caller, bucket) for caller, bucket in self._buckets.items()}
        kept = [caller for caller in self._buckets if full_at[caller] > now]
        if len(kept) > _MOST_REMEMBERED // 2:
            kept = heapq.nlargest(_MOST_REMEMBERED // 2, kept, key=full_at.__getitem__)
        self._buckets = {caller: self._buckets[caller] for caller in kept}
        self._sweep_at = max(2 * len(kept), _MOST_REMEMBERED // 4)

    def _full_at(self, caller: str, bucket: Bucket) -> float:
        limits = self._limits_of(caller)
        return bucket.full_at(limits) if limits.requests_per_second else -math.inf

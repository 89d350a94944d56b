"""Whether and when a call that failed is tried again: a pure function of the error, the attempt and the time left.

Both clients ask `RetryPolicy.wait_seconds` after a call failed before its first message. It never says to wait past the deadline:
then the caller should hear of the failure now.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from camserve.client.errors import CamserveError

LOADING_SECONDS: Final = 600.0
"""How long a call waits for a model to be loaded or unloaded, if nobody says: minutes are usual for large ones."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How calls are retried.

    Attributes:
        retries: how often a call is tried again at most; 0 never.
        first_seconds: the longest wait before the first retry; it doubles with each further one.
        longest_seconds: where the doubling ends.
    """

    retries: int = 3
    first_seconds: float = 0.2
    longest_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; 0 means never")

    def wait_seconds(
        self,
        error: CamserveError,
        *,
        attempt: int,
        remaining_seconds: float | None,
        chance: float,
    ) -> float | None:
        """Tells how long to wait before trying again.

        Args:
            error: what the last attempt failed with.
            attempt: how many attempts were made.
            remaining_seconds: time left to the caller, or None.
            chance: a random number in [0, 1); it spreads callers that were refused together.

        Returns:
            Seconds, or None when the error should be raised.
        """
        if not error.is_temporary or attempt > self.retries:
            return None
        if error.retry_after is not None:
            # Never before the server asked; up to a fifth later.
            wait = error.retry_after * (1 + chance / 5)
        else:
            ceiling = min(self.first_seconds * 2 ** (attempt - 1), self.longest_seconds)
            wait = ceiling * (0.5 + chance / 2)
        if remaining_seconds is not None and wait >= remaining_seconds:
            return None
        return wait

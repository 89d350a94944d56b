"""What the load generator offers and what it wrote down: loads, one `Record` for each request, and a `Step` of them.

`load.py` makes the records while it runs, `figures.py` reads them afterwards. All times are seconds from the start of the window
that counts; what belongs to the warm-up before it has negative times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, TypeAlias

from camserve.client.results import Timings

NOT_SENT: Final = "NOT_SENT"
"""The code of a request that was due while as many as allowed were under way."""


@dataclasses.dataclass(frozen=True, slots=True)
class Closed:
    """A closed loop: so many callers, each of whom asks again as soon as it was answered.

    Attributes:
        concurrency: how many callers.
        heeds_retry_after: whether a caller that is turned away waits as long as the server asks, or 0.05 s if it does not say.
            Those of an open loop never wait: each request has a caller of its own.
    """

    concurrency: int
    heeds_retry_after: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; it is at least 1")

    @property
    def value(self) -> float:
        """The number that a sweep varies."""
        return float(self.concurrency)

    def __str__(self) -> str:
        return f"{self.concurrency} callers" if self.concurrency > 1 else "1 caller"


@dataclasses.dataclass(frozen=True, slots=True)
class Open:
    """An open loop: requests fall due by chance, whether or not earlier ones were answered.

    Attributes:
        rate: requests a second on average; the times between them are exponential, so that the arrivals are Poisson's.
        max_in_flight: how many may be under way; one that falls due above that is counted as not sent.
    """

    rate: float
    max_in_flight: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"rate is {self.rate}; it is a number of requests a second above 0")
        if self.max_in_flight < 1:
            raise ValueError(f"max_in_flight is {self.max_in_flight}; it is at least 1")

    @property
    def value(self) -> float:
        """The number that a sweep varies."""
        return self.rate

    def __str__(self) -> str:
        return f"{self.rate:g}/s"


Load: TypeAlias = Closed | Open


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How long a load is offered, given by one of `seconds` and `requests`.

    With `seconds` the load goes on from the warm-up into the window without a pause; requests under way at its end are waited
    for, since leaving them out would leave out the slowest. With `requests` those of the warm-up end before the window begins,
    and the window ends with its last answer.

    Attributes:
        seconds: length of the window that counts.
        requests: how many requests count.
        warm_up_seconds: how long the same load is offered before it.
    """

    seconds: float | None = None
    requests: int | None = None
    warm_up_seconds: float = 0.0

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.requests is None) or not (self.seconds or self.requests or 0) > 0:
            raise ValueError(
                f"give seconds above 0 or at least 1 request, not seconds={self.seconds}, requests={self.requests}"
            )
        if not self.warm_up_seconds >= 0:
            raise ValueError(f"warm_up_seconds is {self.warm_up_seconds}; 0 means none")


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed, or one spec of it.

    Attributes:
        code: gRPC's status, such as "RESOURCE_EXHAUSTED".
        reason: camserve's reason, such as "QUEUE_FULL"; empty where it gave none, such as gRPC's own deadline.
    """

    code: str
    reason: str

    def __str__(self) -> str:
        if not self.reason:
            return f"{self.code}, told by gRPC itself"
        return self.code if self.code == self.reason else f"{self.code} {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request, as its caller saw it.

    Attributes:
        kind: index of its kind in the mix.
        intended: when it was due. Latency counts from here, so that a generator that falls behind cannot hide it.
        sent: when it was handed to gRPC; None if it was not.
        first: when the first message, the prediction, had arrived; None if none did.
        ended: when the last message or the failure had arrived.
        code: gRPC's status, such as "OK" or "RESOURCE_EXHAUSTED"; NOT_SENT if it was not sent.
        reason: camserve's reason, such as "QUEUE_FULL"; empty where it gave none.
        retry_after: seconds after which the server asked to be tried again, or None.
        spec_errors: why of each spec that failed while the request did not.
        maps: how many maps arrived.
        partial_maps: how many of them were unfinished when their deadline came.
        batch_rows: rows that shared the pass, from the summary; None without one.
        timings: where the server's time went, from the summary; None without one.
        received_bytes: size of all messages that arrived.
    """

    kind: int
    intended: float
    sent: float | None
    first: float | None
    ended: float
    code: str
    reason: str = ""
    retry_after: float | None = None
    spec_errors: tuple[Failure, ...] = ()
    maps: int = 0
    partial_maps: int = 0
    batch_rows: int | None = None
    timings: Timings | None = None
    received_bytes: int = 0

    @property
    def is_ok(self) -> bool:
        """Whether the answer is whole: the call succeeded, and every spec of it."""
        return self.code == "OK" and not self.spec_errors

    @property
    def latency(self) -> float:
        """Seconds from when it was due to its end."""
        return self.ended - self.intended

    @property
    def first_latency(self) -> float | None:
        """Seconds from when it was due to the first message; None if none arrived."""
        return None if self.first is None else self.first - self.intended

    @property
    def lag(self) -> float | None:
        """Seconds by which the generator was late in sending it; None if it was not sent."""
        return None if self.sent is None else self.sent - self.intended


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What was recorded under one load.

    Attributes:
        load: what was offered.
        seconds: length of the window that counts.
        records: every request, in the order in which they ended; those of the warm-up have negative intended times.
        loop_seconds: processor time that the generator's own thread took, warm-up and all.
        wall_seconds: what passed meanwhile.
        is_complete: False when it was stopped before its end.
    """

    load: Load
    seconds: float
    records: Sequence[Record]
    loop_seconds: float
    wall_seconds: float
    is_complete: bool = True

    @property
    def due(self) -> list[Record]:
        """The requests that fell due in the window: what latencies and shares are taken over."""
        return [record for record in self.records if 0 <= record.intended <= self.seconds]

    @property
    def ended(self) -> list[Record]:
        """The requests that ended in the window, whenever they began: what throughput is taken over."""
        return [record for record in self.records if 0 <= record.ended <= self.seconds]

"""What is to be planned: requests that wait for a pass, and amplified work that waits for its next chunk.

`queue.py` makes a `Candidate` of each; the planner reads them, the cost model remembers by their keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from types import MappingProxyType

from camserve.server.jobs import Lane

__all__ = ["PATIENCE_SECONDS", "BatchKey", "Candidate", "WorkKey"]

PATIENCE_SECONDS: Mapping[Lane, float] = MappingProxyType(
    {Lane.INTERACTIVE: 1.0, Lane.STANDARD: 30.0, Lane.BULK: 300.0}
)
"""By lane: within it a request counts as if it had to be answered within this time, however much later its deadline is.

Who names no deadline, or a far one, would otherwise be overtaken for ever by those who hurry."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """What requests must have in common to share a pass. Method, layer, target and encoding are not in it.

    Attributes:
        model: name.
        version: of the model.
        load_number: tells apart what a version was before and after it was loaded anew.
        shape: of one row.
        dtype: numpy name of the input's.
        extra_shapes: of further inputs.
        form: which form of the program runs the pass.
    """

    model: str
    version: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    extra_shapes: tuple[tuple[int, ...], ...] = ()
    form: str = ""
    load_number: int = 0
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Looked up for every row at every decision: hashed once.
        fields = (self.model, self.version, self.shape, self.dtype, self.extra_shapes, self.form, self.load_number)
        object.__setattr__(self, "_hash", hash(fields))

    def __hash__(self) -> int:
        return self._hash


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkKey:
    """What amplified works must have in common to take about as long.

    Attributes:
        model: name.
        version: of the model.
        method: slug.
        layers: as written.
        budget: whatever else says how much is to be done: parameters, number of targets, shape of the input.
    """

    model: str
    version: str
    method: str
    layers: tuple[str, ...] = ()
    budget: Hashable = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One row that waits for a pass, or one amplified work that waits for its next chunk.

    Attributes:
        ticket: its place in order of arrival; work that comes back for its next chunk takes a new one.
        key: whom it can ride with.
        depth: how far back the gradient goes: 0 for a forward alone, larger for shallower layers.
        max_rows: most rows that its model takes in one pass.
        lane: how urgent it is against others.
        caller: who asked.
        enqueued_at: monotonic seconds.
        deadline: monotonic seconds, or infinity.
        work: for a chunk, what it is a chunk of; None for a row that waits for a pass.
        due: by when it should have run: its deadline, or the end of our patience with its lane.
    """

    ticket: int
    key: BatchKey
    depth: int = 0
    max_rows: int
    lane: Lane = Lane.STANDARD
    caller: str = ""
    enqueued_at: float
    deadline: float = math.inf
    work: WorkKey | None = None
    due: float = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "due", min(self.deadline, self.enqueued_at + PATIENCE_SECONDS[self.lane]))

"""What a request will ask of the device, read off its specs before anything is decoded.

`pipeline.py` makes a `Demand` of every job; the door refuses by it, the queue counts it, and the planner groups by it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from camserve.server.engine.effort import effort_of
from camserve.server.jobs import Job, Spec, TopClasses
from camserve.server.models.repository import ServedModel
from camserve.server.scheduling import BatchKey, WorkKey

__all__ = ["Demand", "demand_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one request asks.

    Attributes:
        job: whose.
        model: that is to run.
        key: whom it will ride with if its input has the size that the card tells.
        depth: how far back its gradient goes.
        caller: who shares with others, by the name of its `Caller`.
        works: of each spec by its index, what tells how long amplified work takes; empty when none is amplified.
        asked_depth: the same as `depth`, of the caller's own specs alone.
        maybe: those whose amplified work may not be wanted: a rule's condition decides, once the model has spoken.
    """

    job: Job
    model: ServedModel
    key: BatchKey
    depth: int = 0
    caller: str = ""
    works: Mapping[int, WorkKey] = dataclasses.field(default_factory=dict)
    asked_depth: int = 0
    maybe: frozenset[int] = frozenset()

    @property
    def deadline(self) -> float:
        """Monotonic seconds, or infinity."""
        return math.inf if self.job.deadline is None else self.job.deadline


def demand_of(job: Job, model: ServedModel) -> Demand:
    """Reads it off a validated job."""
    effort = effort_of(model.pass_model, job.specs)
    card = model.card
    key = BatchKey(
        model=job.model,
        version=job.version,
        load_number=model.load_number,
        shape=tuple(card.recipe.shape),
        extra_shapes=tuple(extra.shape for extra in card.extra_inputs),
        form=effort.form,
    )
    return Demand(
        job=job,
        model=model,
        key=key,
        depth=effort.depth,
        caller=job.caller,
        works={spec.index: _work_key(key, spec) for spec in job.specs} if effort.is_amplified else {},
        asked_depth=effort_of(model.pass_model, job.asked).depth if job.rules else effort.depth,
        maybe=frozenset(
            use.spec_index for use in job.rules if use.spec_index is not None and use.condition is not None
        ),
    )


def _work_key(key: BatchKey, spec: Spec) -> WorkKey:
    about = spec.target.about
    # What changes neither the number of tries nor their size must not tell one work from another.
    budget = (
        dataclasses.replace(spec.parameters, seed=0, allows_partial=False),
        spec.smoothing,
        type(about).__name__,
        about.k if isinstance(about, TopClasses) else 1,
        key.shape,
    )
    return WorkKey(model=key.model, version=key.version, method=spec.method, layers=spec.layers, budget=budget)

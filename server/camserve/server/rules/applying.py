"""What the rules of a model add to one request: a validated job arrives, the same with further specs behind its own leaves.

`service.py` and `local/` call it; pure, and on the event loop.
"""

from __future__ import annotations

import dataclasses

from camserve.server.errors import CamserveError
from camserve.server.jobs import Circumstances, Job, JobInput, RuleUse, Spec
from camserve.server.models.card import ModelCard
from camserve.server.rules.sampling import is_sampled
from camserve.server.validate import check_rendering

__all__ = ["apply_rules"]


def apply_rules(job: Job, card: ModelCard) -> Job:
    """Adds a spec for each rule that takes the request; whether its condition holds shows behind the forward.

    Args:
        job: validated; its own specs count against the limits, those of rules do not.
        card: of its model.
    """
    if not card.rules:
        return job
    circumstances = Circumstances(
        model=card.name, version=card.version, lane=job.lane, labels=job.labels, asked=bool(job.specs)
    )
    specs, uses = list(job.specs), []
    for rule in card.rules:
        index = None
        if is_sampled(rule.name, job.request_id, rule.sample):
            index = len(specs)
            specs.append(dataclasses.replace(rule.spec, index=index))
        uses.append(
            RuleUse(
                name=rule.name,
                spec_index=index,
                circumstances=circumstances,
                condition=rule.condition,
                obstacle=None if index is None else _obstacle(specs[index], job.payload, rule.name),
            )
        )
    return dataclasses.replace(job, specs=tuple(specs), rules=tuple(uses))


def _obstacle(spec: Spec, payload: JobInput, rule: str) -> CamserveError | None:
    try:
        check_rendering(spec, payload, f"rules[{rule}]")
    except CamserveError as error:
        return error
    return None

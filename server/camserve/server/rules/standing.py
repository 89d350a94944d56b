"""What became of each rule of one request, as its answer is made; `pipeline.py` and `local/` tell it every event.

A rule's explanation may fail in any way without the request failing with it: the deadline, for one, ends only what the rules
added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from camserve.server.errors import CamserveError, DeadlineExceeded, Reason
from camserve.server.jobs import Heatmap, Job, Reading, RuleOutcome, RuleUse, RuleVerdict, SpecFailed
from camserve.server.last_call import last_call_seconds

__all__ = ["Standing"]


class Standing:
    """The rules of one request.

    Attributes:
        give_up_at: monotonic seconds at which to stop waiting for rules alone, so that the answer still arrives; None without a
            deadline, or without rules.

    Args:
        job: with its rules applied.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._outcomes: dict[int, RuleOutcome] = {}
        self._asked: Final = {spec.index for spec in job.asked}
        adds = any(use.spec_index is not None for use in job.rules)
        self.give_up_at = None if job.deadline is None or not adds else job.deadline - last_call_seconds(job)

    @property
    def waits_for_rules_only(self) -> bool:
        """Whether everything that the caller asked for has been answered."""
        return not self._asked

    def is_over(self, spec_index: int) -> bool:
        """Whether a rule's spec has been told to its end."""
        return spec_index in self._outcomes

    def told(self, event: Heatmap | SpecFailed) -> Heatmap | SpecFailed:
        """Takes note of an event; returns it with the name of its rule, if it has one."""
        index = event.raw.spec_index if isinstance(event, Heatmap) else event.spec_index
        is_last = isinstance(event, SpecFailed) or event.raw.target.rank == event.raw.target.count - 1
        use = self._job.rule_of(index)
        if use is None:
            if is_last:
                self._asked.discard(index)
            return event
        if is_last:
            is_made = isinstance(event, Heatmap)
            self._outcomes[index] = RuleOutcome.APPLIED if is_made else RuleOutcome.FAILED
        return dataclasses.replace(event, rule=use.name)

    def give_up(self, reading: Reading) -> Iterator[SpecFailed]:
        """Ends the rules that are due and not yet over, because the deadline is near."""
        error = DeadlineExceeded(
            Reason.DEADLINE_EXCEEDED,
            "the deadline came before the rule's explanation was made; give the request longer",
        )
        return self.fail(reading, error)

    def fail(self, reading: Reading, error: CamserveError) -> Iterator[SpecFailed]:
        """Ends the rules that are due and not yet over; not told yet.

        Args:
            reading: what the model said.
            error: why.
        """
        for use in self._job.rules:
            if use.spec_index is not None and not self.is_over(use.spec_index) and _is_due(use, reading):
                yield SpecFailed(spec_index=use.spec_index, error=error)

    def verdicts(self) -> tuple[RuleVerdict, ...]:
        """What became of each rule, in the order of the card; what has not been told when the pass is over was not due."""
        return tuple(RuleVerdict(rule=use.name, outcome=self._outcome(use)) for use in self._job.rules)

    def _outcome(self, use: RuleUse) -> RuleOutcome:
        if use.spec_index is None:
            return RuleOutcome.NOT_SAMPLED
        return self._outcomes.get(use.spec_index, RuleOutcome.NOT_MET)


def _is_due(use: RuleUse, reading: Reading) -> bool:
    try:
        return use.is_due(reading)
    except CamserveError:
        return True

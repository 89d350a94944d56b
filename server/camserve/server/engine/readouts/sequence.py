"""Sequences: class scores for every step, such as the characters of a line of text; each step has a map of its own.

`read` in `__init__.py` makes a `SequenceReadout` for each pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts.readout import Aim
from camserve.server.engine.readouts.refusals import check_class, no_contrast, no_target, not_finite
from camserve.server.engine.readouts.terms import contrasted, weigh
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import OutputKind, Predicted, Reading, ResolvedTarget, Steps, Target

__all__ = ["SequenceReadout"]

_KIND = OutputKind.SEQUENCE


class SequenceReadout:
    """Reads (b, steps, classes)."""

    def __init__(self, logits: Float[Tensor, "b steps classes"]) -> None:
        self._logits = logits

    @property
    def requires_grad(self) -> bool:
        """Whether scores can be differentiated."""
        return self._logits.requires_grad

    def readings(self) -> Sequence[Reading]:
        """Logits and softmax probabilities, (steps, classes)."""
        pairs = zip(self._host.float().numpy(), self._host.softmax(dim=2).float().numpy(), strict=True)
        return [Reading(kind=_KIND, scores=scores, probabilities=shares) for scores, shares in pairs]

    def aims(self, row: int, target: Target, contrast: Contrast | None = None) -> tuple[Aim, ...]:
        """One aim for each step, in order; `Predicted` takes all steps. See `Readout.aims`."""
        if not self._host[row].isfinite().all():
            raise not_finite("logits")
        about = Steps() if isinstance(target.about, Predicted) else target.about
        if not isinstance(about, Steps):
            raise no_target(_KIND, about, ("predicted", "steps"))
        classes = self._host.shape[2]
        if contrast is not None and classes < 2:
            raise no_contrast(_KIND, "this model's output has no other classes")
        steps = _steps(about, self._host.shape[1])
        chosen = about.classes or tuple(int(index) for index in self._host[row, steps.start : steps.stop].argmax(dim=1))
        for index in chosen:
            check_class(index, classes)
        return tuple(
            self._aim(row, target, step, index, contrast, rank, len(steps))
            for rank, (step, index) in enumerate(zip(steps, chosen, strict=True))
        )

    def scores(self, aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
        """Each row's score at its aim's step; see `Readout.scores`."""
        steps = [0 if aim is None or aim.step is None else aim.step for aim in aims]
        places = torch.tensor(steps, device=self._logits.device).view(-1, 1, 1)
        if len(steps) != len(self._logits):
            raise ValueError(
                f"{len(steps)} aims for a batch of {len(self._logits)} rows; give one for each row, or None"
            )
        return weigh(self._logits.gather(1, places.expand(-1, 1, self._logits.shape[2]))[:, 0], aims)

    def detach(self) -> None:
        """Frees the graph; readings stay."""
        self._logits = self._logits.detach()

    @functools.cached_property
    def _host(self) -> Float[Tensor, "b steps classes"]:
        """One copy for readings and targets, which scores alone do not need."""
        return self._logits.detach().to("cpu", torch.float64)

    def _aim(
        self, row: int, target: Target, step: int, index: int, contrast: Contrast | None, rank: int, count: int
    ) -> Aim:
        logits = self._host[row, step]
        terms = ((index, 1.0),) if contrast is None else contrasted(logits.numpy(), index, contrast)
        by_probability = contrast is not None and contrast.by_probability
        told = ResolvedTarget(
            class_index=index,
            score=target.score,
            value=0.0,
            rank=rank,
            count=count,
            other_class_index=terms[1][0] if len(terms) > 1 else None,
            step=step,
        )
        key = (step, terms, by_probability, target.score, target.polarity)
        aim = Aim(target=told, key=key, weights=terms, by_probability=by_probability, step=step)
        value = float(weigh(logits[None], [aim])[0])
        return dataclasses.replace(aim, target=dataclasses.replace(told, value=value, polarity=target.polarity))


def _steps(about: Steps, total: int) -> range:
    """The steps asked about."""
    if about.classes and about.count not in (None, len(about.classes)):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{len(about.classes)} classes are given for {about.count} steps; give one for each step, or leave out the count",
            metadata={"classes": len(about.classes), "count": about.count},
        )
    count = len(about.classes) or (total - about.first if about.count is None else about.count)
    if about.first < 0 or count < 1 or about.first + count > total:
        last = about.first + max(count, 1) - 1
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"steps {about.first} to {last} were asked for, and the model's output has steps 0 to {total - 1}",
            metadata={"first": about.first, "count": count, "steps": total},
        )
    return range(about.first, about.first + count)

"""Outputs with one number for each class: classification, multi-label classification, and regression, where they are values.

`read` in `__init__.py` makes a `ClassReadout` for each pass; `passes.py` uses it. Dense outputs share the terms made here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts.readout import Aim
from camserve.server.engine.readouts.refusals import (
    check_class,
    check_count,
    no_contrast,
    no_score,
    no_target,
    not_finite,
)
from camserve.server.engine.readouts.terms import contrasted, weigh
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import (
    ClassesAbove,
    ClassIndex,
    Difference,
    KthClass,
    OutputKind,
    Predicted,
    Reading,
    ResolvedTarget,
    Score,
    Target,
    TopClasses,
)

__all__ = ["ClassKind", "ClassReadout", "Terms", "difference_terms", "none_above"]

ClassKind: TypeAlias = Literal[OutputKind.CLASSIFICATION, OutputKind.MULTI_LABEL, OutputKind.REGRESSION]
Terms: TypeAlias = tuple[tuple[int, float], ...]

_OFFERED = ("predicted", "class_index", "kth", "top", "above", "difference")


class ClassReadout:
    """Reads (b, classes); of regression (b, values), of which the largest counts as predicted."""

    def __init__(self, kind: ClassKind, logits: Float[Tensor, "b classes"]) -> None:
        self._kind = kind
        self._logits = logits

    @property
    def requires_grad(self) -> bool:
        """Whether scores can be differentiated."""
        return self._logits.requires_grad

    def readings(self) -> Sequence[Reading]:
        """Logits and probabilities of each row; of regression the values alone."""
        probabilities = self._probabilities().float()
        if self._kind is OutputKind.REGRESSION:
            probabilities = probabilities[:, :0]
        pairs = zip(self._host.float().numpy(), probabilities.numpy(), strict=True)
        return [Reading(kind=self._kind, scores=scores, probabilities=shares) for scores, shares in pairs]

    def aims(self, row: int, target: Target, contrast: Contrast | None = None) -> tuple[Aim, ...]:
        """One aim for each class, best first; see `Readout.aims`."""
        if not self._host[row].isfinite().all():
            raise not_finite("logits")
        if self._kind is OutputKind.REGRESSION and target.score is not Score.LOGIT:
            raise no_score(self._kind, target.score, (Score.LOGIT,))
        all_terms = self._terms(row, target, contrast)
        return tuple(
            self._aim(
                row,
                target,
                terms,
                rank,
                len(all_terms),
                by_probability=contrast is not None and contrast.by_probability,
            )
            for rank, terms in enumerate(all_terms)
        )

    def scores(self, aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
        """See `Readout.scores`."""
        return weigh(self._logits, aims, has_sigmoid=self._kind is OutputKind.MULTI_LABEL)

    def detach(self) -> None:
        """Frees the graph; readings stay."""
        self._logits = self._logits.detach()

    @functools.cached_property
    def _host(self) -> Float[Tensor, "b classes"]:
        """One copy for readings and targets, which scores alone do not need; double, to tell a probability near 1 exactly."""
        return self._logits.detach().to("cpu", torch.float64)

    def _terms(self, row: int, target: Target, contrast: Contrast | None) -> list[Terms]:
        if isinstance(target.about, Difference):
            if contrast is not None:
                raise no_contrast(self._kind, "a difference names the other class itself")
            return [difference_terms(target.about, self._host.shape[1])]
        chosen = self._classes(row, target)
        if contrast is None:
            return [((index, 1.0),) for index in chosen]
        if self._kind is OutputKind.REGRESSION or self._host.shape[1] < 2:
            raise no_contrast(self._kind, "this model's output has no other classes")
        return [contrasted(self._host[row].numpy(), index, contrast) for index in chosen]

    def _classes(self, row: int, target: Target) -> list[int]:
        count = self._host.shape[1]
        ranking = [int(index) for index in self._host[row].argsort(descending=True, stable=True)]
        match target.about:
            case Predicted():
                return ranking[:1]
            case ClassIndex(index):
                check_class(index, count)
                return [index]
            case KthClass(k):
                check_count(k, count)
                return [ranking[k - 1]]
            case TopClasses(k):
                check_count(k, count)
                return ranking[:k]
            case ClassesAbove(threshold) if self._kind is not OutputKind.REGRESSION:
                probabilities = self._probabilities()[row]
                above = [index for index in ranking if float(probabilities[index]) > threshold]
                if not above:
                    raise none_above("class", threshold, float(probabilities.max()))
                return above
            case about:
                offered = [name for name in _OFFERED if name != "above" or self._kind is not OutputKind.REGRESSION]
                raise no_target(self._kind, about, offered)

    def _aim(self, row: int, target: Target, terms: Terms, rank: int, count: int, *, by_probability: bool) -> Aim:
        told = ResolvedTarget(
            class_index=terms[0][0],
            score=target.score,
            value=0.0,
            rank=rank,
            count=count,
            other_class_index=terms[1][0] if len(terms) > 1 else None,
        )
        key = (terms, by_probability, target.score, target.polarity)
        aim = Aim(target=told, key=key, weights=terms, by_probability=by_probability)
        # Before polarity, and from the host's copy: no device waits for it.
        value = float(weigh(self._host[row : row + 1], [aim], has_sigmoid=self._kind is OutputKind.MULTI_LABEL)[0])
        return dataclasses.replace(aim, target=dataclasses.replace(told, value=value, polarity=target.polarity))

    def _probabilities(self) -> Float[Tensor, "b classes"]:
        return self._host.sigmoid() if self._kind is OutputKind.MULTI_LABEL else self._host.softmax(dim=1)


def difference_terms(about: Difference, classes: int) -> Terms:
    """The terms of one class rather than another.

    Raises:
        InvalidRequest: either does not exist, or they are the same.
    """
    check_class(about.index, classes)
    check_class(about.other, classes, what="other class index")
    if about.index == about.other:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"a difference needs two classes, and both are {about.index}; name another class to argue against",
            metadata={"value": about.index},
        )
    return ((about.index, 1.0), (about.other, -about.weight))


def none_above(what: str, threshold: float, largest: float) -> InvalidRequest:
    """Nothing is above the threshold."""
    return InvalidRequest(
        Reason.FIELD_INVALID,
        f"no {what} is above {threshold:g}: the largest is {largest:g}; ask for less, or for the predicted one",
        metadata={"threshold": threshold, "largest": largest},
    )

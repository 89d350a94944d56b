"""Outputs with one number for each class: classification, multi-label classification, and regression, where they are values.

`read` in `__init__.py` makes a `ClassReadout` for each pass; `passes.py` uses it. Dense outputs share the terms made here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
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
        probabilities = self._host[:, :0] if self._kind is OutputKind.REGRESSION else self._probabilities()
        pairs = zip(self._host.astype(np.float32), probabilities.astype(np.float32), strict=True)
        return [Reading(kind=self._kind, scores=scores, probabilities=shares) for scores, shares in pairs]

    def aims(self, row: int, target: Target, contrast: Contrast | None = None) -> tuple[Aim, ...]:
        """One aim for each class, best first; see `Readout.aims`."""
        if not self._is_finite[row]:
            raise not_finite("logits")
        if self._kind is OutputKind.REGRESSION and target.score is not Score.LOGIT:
            raise no_score(self._kind, target.score, (Score.LOGIT,))
        by_probability = contrast is not None and contrast.by_probability
        all_terms = self._terms(row, target, contrast)
        return tuple(
            Aim(
                target=ResolvedTarget(
                    class_index=terms[0][0],
                    score=target.score,
                    value=self._value(row, target.score, terms, by_probability=by_probability),
                    rank=rank,
                    count=len(all_terms),
                    polarity=target.polarity,
                    other_class_index=terms[1][0] if len(terms) > 1 else None,
                ),
                key=(terms, by_probability, target.score, target.polarity),
                weights=terms,
                by_probability=by_probability,
            )
            for rank, terms in enumerate(all_terms)
        )

    def scores(self, aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
        """See `Readout.scores`."""
        return self._weighed(self._logits, aims)

    def detach(self) -> None:
        """Frees the graph; readings stay."""
        self._logits = self._logits.detach()

    @functools.cached_property
    def _host(self) -> npt.NDArray[np.float64]:
        """One copy for readings and targets, which scores alone do not need; double, to tell a probability near 1 exactly."""
        return self._logits.detach().to("cpu", torch.float64).numpy()

    @functools.cached_property
    def _is_finite(self) -> npt.NDArray[np.bool_]:
        """(b): of each row, whether there is something to rank."""
        return np.asarray(np.isfinite(self._host).all(axis=1))

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
        return [contrasted(self._host[row], index, contrast) for index in chosen]

    def _classes(self, row: int, target: Target) -> list[int]:
        count = self._host.shape[1]
        match target.about:
            case Predicted():
                return [int(self._host[row].argmax())]
            case ClassIndex(index):
                check_class(index, count)
                return [index]
            case KthClass(k):
                check_count(k, count)
                return [self._ranking(row)[k - 1]]
            case TopClasses(k):
                check_count(k, count)
                return self._ranking(row)[:k]
            case ClassesAbove(threshold) if self._kind is not OutputKind.REGRESSION:
                probabilities = self._probabilities()[row]
                above = [index for index in self._ranking(row) if probabilities[index] > threshold]
                if not above:
                    raise none_above("class", threshold, float(probabilities.max()))
                return above
            case about:
                offered = [name for name in _OFFERED if name != "above" or self._kind is not OutputKind.REGRESSION]
                raise no_target(self._kind, about, offered)

    def _ranking(self, row: int) -> list[int]:
        """All classes, best first; ties by lower index."""
        ranking: list[int] = np.argsort(-self._host[row], kind="stable").tolist()
        return ranking

    def _value(self, row: int, score: Score, terms: Terms, *, by_probability: bool) -> float:
        """The score before polarity, from the host's copy: no device waits for it."""
        if score is Score.LOGIT and len(terms) == 1:
            return float(self._host[row, terms[0][0]])
        told = ResolvedTarget(class_index=None, score=score, value=0.0)
        aim = Aim(target=told, key=None, weights=terms, by_probability=by_probability)
        return float(self._weighed(torch.from_numpy(self._host[row : row + 1]), [aim])[0])

    def _weighed(self, logits: Float[Tensor, "b classes"], aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
        return weigh(logits, aims, has_sigmoid=self._kind is OutputKind.MULTI_LABEL)

    def _probabilities(self) -> npt.NDArray[np.float64]:
        """(b classes)."""
        logits = torch.from_numpy(self._host)
        shares = logits.sigmoid() if self._kind is OutputKind.MULTI_LABEL else logits.softmax(dim=1)
        return shares.numpy()


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

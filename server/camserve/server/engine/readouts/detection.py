"""Detection: for each row boxes, labels and scores, as torchvision's detectors return them; a target is one detection's score.

`read` in `__init__.py` makes a `DetectionReadout` for each pass. A detection of one pass need not exist in another. An aim
therefore holds its box: where the row still has that very detection, its score is taken, and any other output is matched anew
in the way of D-RISE (arXiv:2006.03204): the largest overlap times score over the detections of the same class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts.classes import none_above
from camserve.server.engine.readouts.readout import Aim
from camserve.server.engine.readouts.refusals import no_contrast, no_score, no_target, not_finite
from camserve.server.engine.readouts.terms import signs, widened
from camserve.server.errors import CamserveError, InvalidRequest, NotFound, Reason
from camserve.server.jobs import (
    Box,
    ClassesAbove,
    ClassIndex,
    Detection,
    KthClass,
    OutputKind,
    PlacedBox,
    Polarity,
    Predicted,
    Reading,
    ResolvedTarget,
    Score,
    Target,
    TopClasses,
)

__all__ = ["DetectionReadout"]

_KIND = OutputKind.DETECTION
_OFFERED = ("predicted", "class_index", "kth", "top", "above", "detection")
_Ranked: TypeAlias = Predicted | ClassIndex | KthClass | TopClasses | ClassesAbove
_NOTHING = "the model detects nothing in this input; lower the detector's own score threshold, or send another image"


class DetectionReadout:
    """Reads what a detector found. Detections are ranked by score, ties by lower index.

    Args:
        answers: for each row boxes (n 4) as left, top, right, bottom in pixels of the input, labels (n) and scores (n).
    """

    def __init__(self, answers: Sequence[Mapping[str, Tensor]]) -> None:
        self._scores = [answer["scores"] for answer in answers]
        self._boxes = [answer["boxes"].detach().to("cpu", torch.float64).numpy() for answer in answers]
        self._labels = [answer["labels"].cpu().numpy() for answer in answers]
        self._values = [scores.detach().to("cpu", torch.float64).numpy() for scores in self._scores]
        self._rankings = [[int(place) for place in np.argsort(-values, kind="stable")] for values in self._values]

    @property
    def requires_grad(self) -> bool:
        """Whether scores can be differentiated."""
        return any(scores.requires_grad for scores in self._scores)

    def readings(self) -> Sequence[Reading]:
        """The detections of each row, best first."""
        none = np.empty(0, dtype=np.float32)
        return [
            Reading(
                kind=_KIND,
                scores=none,
                probabilities=none,
                detections=tuple(self._detection(row, place) for place in ranking),
            )
            for row, ranking in enumerate(self._rankings)
        ]

    def aims(self, row: int, target: Target, contrast: Contrast | None = None) -> tuple[Aim, ...]:
        """One aim for each detection, best first; see `Readout.aims`. `TopClasses` gives fewer than k where there are fewer."""
        if not (np.isfinite(self._values[row]).all() and np.isfinite(self._boxes[row]).all()):
            raise not_finite("detections")
        if target.score is not Score.LOGIT:
            raise no_score(_KIND, target.score, (Score.LOGIT,))
        if contrast is not None:
            raise no_contrast(_KIND, "a detection has none")
        iou = None
        if isinstance(target.about, PlacedBox):
            place, iou = self._match(row, target.about)
            places = [place]
        else:
            places = self._places(row, target)
        return tuple(
            self._aim(row, place, target.polarity, rank, len(places), iou) for rank, place in enumerate(places)
        )

    def scores(self, aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
        """See `Readout.scores`; 0 where no detection of the aim's class overlaps its box."""
        if len(aims) != len(self._scores):
            raise ValueError(
                f"{len(aims)} aims for a batch of {len(self._scores)} rows; give one for each row, or None"
            )
        found = torch.stack([self._score(row, aim) for row, aim in enumerate(aims)])
        return found * signs(aims, found)

    def detach(self) -> None:
        """Frees the graph; readings stay."""
        self._scores = [scores.detach() for scores in self._scores]

    def _places(self, row: int, target: Target) -> list[int]:
        ranking = self._rankings[row]
        about = target.about
        if not isinstance(about, _Ranked):
            raise no_target(_KIND, about, _OFFERED)
        if isinstance(about, KthClass | TopClasses) and about.k < 1:
            raise InvalidRequest(
                Reason.FIELD_INVALID, f"k {about.k} is out of range: it must be at least 1", metadata={"value": about.k}
            )
        match about:
            case Predicted():
                places = ranking[:1]
            case TopClasses(k):
                places = ranking[:k]
            case KthClass(k):
                places = ranking[k - 1 : k]
            case ClassIndex(index):
                places = [place for place in ranking if self._labels[row][place] == index][:1]
            case ClassesAbove(threshold):
                places = [place for place in ranking if self._values[row][place] > threshold]
        if not places:
            raise self._nothing_for(row, about)
        return places

    def _nothing_for(self, row: int, about: _Ranked) -> CamserveError:
        """Why no detection is meant."""
        ranking = self._rankings[row]
        match about:
            case ClassesAbove(threshold) if ranking:
                return none_above("detection's score", threshold, float(self._values[row].max()))
            case KthClass(k) if ranking:
                return _missing(f"there is no detection {k}: the model made {len(ranking)} of this input", k)
            case ClassIndex(index) if ranking:
                known = ", ".join(map(str, dict.fromkeys(int(self._labels[row][place]) for place in ranking)))
                return _missing(f"no detection is of class {index}; classes detected, best first: {known}", index)
            case _:
                return _missing(_NOTHING, 0)

    def _match(self, row: int, about: PlacedBox) -> tuple[int, float]:
        """The detection that overlaps a box most, of equal ones the best, and the overlap."""
        ranking = self._rankings[row]
        candidates = [place for place in ranking if about.index is None or self._labels[row][place] == about.index]
        if not ranking:
            raise _missing(_NOTHING, 0)
        overlaps = _overlaps(about.box, self._boxes[row])
        best = max(candidates, key=lambda place: overlaps[place], default=None)
        if best is None or overlaps[best] < about.min_iou:
            nearest = max(ranking, key=lambda place: overlaps[place])
            of_class = "" if about.index is None else f" of class {about.index}"
            iou = 0.0 if best is None else float(overlaps[best])
            raise NotFound(
                Reason.FIELD_INVALID,
                f"no detection{of_class} overlaps the box by {about.min_iou:g} or more: the best overlap is {iou:.3f}; nearest "
                f"of any class: {self._told(row, nearest)}, overlap {float(overlaps[nearest]):.3f}; lower min_iou",
                metadata={"minIou": about.min_iou, "iou": iou},
            )
        return best, float(overlaps[best])

    def _aim(self, row: int, place: int, polarity: Polarity, rank: int, count: int, iou: float | None) -> Aim:
        found = self._detection(row, place)
        told = ResolvedTarget(
            class_index=found.class_index,
            score=Score.LOGIT,
            value=found.score,
            rank=rank,
            count=count,
            polarity=polarity,
            box=found.box,
            iou=iou,
        )
        return Aim(
            target=told,
            key=(place, polarity),
            weights=((found.class_index, 1.0),),
            box=found.box,
            detection=place,
        )

    def _score(self, row: int, aim: Aim | None) -> Float[Tensor, ""]:
        scores = widened(self._scores[row])
        if aim is not None and aim.box is not None:
            index = aim.weights[0][0]
            if self._is_same(row, aim):
                return scores[aim.detection]
            overlaps = _overlaps(aim.box, self._boxes[row])
            similar = np.where(self._labels[row] == index, overlaps * self._values[row], 0.0)
            if similar.any():
                place = int(similar.argmax())
                return scores[place] * float(overlaps[place])
        # Of no detection: zero, and part of the graph even so.
        return scores[:0].sum()

    def _is_same(self, row: int, aim: Aim) -> bool:
        """Whether the aim's detection is one of this output's, in its place."""
        place = aim.detection
        if place is None or place >= len(self._labels[row]):
            return False
        found = self._detection(row, place)
        return found.box == aim.box and found.class_index == aim.target.class_index

    def _detection(self, row: int, place: int) -> Detection:
        left, top, right, bottom = (float(edge) for edge in self._boxes[row][place])
        return Detection(
            box=Box(left, top, right - left, bottom - top),
            class_index=int(self._labels[row][place]),
            score=float(self._values[row][place]),
        )

    def _told(self, row: int, place: int) -> str:
        left, top, right, bottom = (float(edge) for edge in self._boxes[row][place])
        label, value = self._labels[row][place], self._values[row][place]
        return f"class {label} at ({left:.1f}, {top:.1f}) to ({right:.1f}, {bottom:.1f}) of the model's input, score {value:.3f}"


def _missing(message: str, value: int) -> NotFound:
    return NotFound(Reason.FIELD_INVALID, message, metadata={"value": value})


def _overlaps(box: Box, others: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
    """Intersection over union of one box with each of the others; 0 where neither has an area."""
    right, bottom = box.left + box.width, box.top + box.height
    widths = np.minimum(right, others[:, 2]) - np.maximum(box.left, others[:, 0])
    heights = np.minimum(bottom, others[:, 3]) - np.maximum(box.top, others[:, 1])
    shared = np.clip(widths, 0, None) * np.clip(heights, 0, None)
    union = box.width * box.height + (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1]) - shared
    overlaps: Float[np.ndarray, "n"] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlaps

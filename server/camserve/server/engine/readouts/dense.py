"""Segmentation: a class for every cell of a grid over the input, asked about by its cells (Seg-Grad-CAM, arXiv:2002.11434).

`read` in `__init__.py` makes a `DenseReadout` for each pass. A model with one channel is binary: it has class 0 alone, and a cell
is predicted as it where its logit is above 0.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn import functional

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts.classes import difference_terms, none_above
from camserve.server.engine.readouts.readout import Aim
from camserve.server.engine.readouts.refusals import check_class, check_count, no_contrast, no_target, not_finite
from camserve.server.engine.readouts.terms import contrasted, weigh, widened
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import (
    About,
    BoolArray,
    ClassesAbove,
    ClassIndex,
    Difference,
    KthClass,
    OutputKind,
    PlacedRegion,
    Polarity,
    Predicted,
    Reading,
    Region,
    ResolvedTarget,
    Target,
    TopClasses,
)

__all__ = ["DenseReadout"]

_KIND = OutputKind.SEGMENTATION
_OFFERED = ("predicted", "class_index", "kth", "top", "above", "difference", "region")
_POOLS = {1: functional.adaptive_max_pool1d, 2: functional.adaptive_max_pool2d, 3: functional.adaptive_max_pool3d}


class DenseReadout:
    """Reads (b, classes, *grid). Classes are ranked by the cells predicted as them, ties by lower index."""

    def __init__(self, logits: Float[Tensor, "b classes *grid"]) -> None:
        self._logits = logits
        self._classes = logits.shape[1]

    @property
    def requires_grad(self) -> bool:
        """Whether scores can be differentiated."""
        return self._logits.requires_grad

    def readings(self) -> Sequence[Reading]:
        """Each class's mean logit over the input, and its share of the cells."""
        means = widened(self._logits.detach()).flatten(2).mean(dim=2).float().cpu().numpy()
        pairs = zip(means, self._shares.astype(np.float32), strict=True)
        return [Reading(kind=_KIND, scores=scores, probabilities=shares) for scores, shares in pairs]

    def aims(self, row: int, target: Target, contrast: Contrast | None = None) -> tuple[Aim, ...]:
        """One aim for each class and its cells; see `Readout.aims`.

        `TopClasses` gives fewer than k where fewer classes are predicted anywhere.
        """
        if not self._logits[row].detach().isfinite().all():
            raise not_finite("logits")
        if isinstance(target.about, Difference):
            if contrast is not None:
                raise no_contrast(_KIND, "a difference names the other class itself")
            terms = difference_terms(target.about, self._classes)
            return (self._aim(row, target, terms, self._cells_of(row, target.about.index)),)
        if contrast is not None and self._classes < 2:
            raise no_contrast(_KIND, "this model's output has no other classes")
        chosen = self._chosen(row, target)
        return tuple(
            self._aim(
                row,
                target,
                ((index, 1.0),) if contrast is None else contrasted(self._over(row, cells), index, contrast),
                cells,
                rank=rank,
                count=len(chosen),
                by_probability=contrast is not None and contrast.by_probability,
            )
            for rank, (index, cells) in enumerate(chosen)
        )

    def scores(self, aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
        """The sums over each aim's cells; see `Readout.scores`."""
        return weigh(self._logits, aims, has_sigmoid=self._classes == 1)

    def detach(self) -> None:
        """Frees the graph; readings stay."""
        self._logits = self._logits.detach()

    @functools.cached_property
    def _predicted(self) -> Int32[np.ndarray, "b *grid"]:
        """The class of each cell, -1 for none; the host never gets the logits themselves, and scores alone not even this."""
        logits = self._logits.detach()
        predicted = logits.argmax(dim=1) if self._classes > 1 else -(logits[:, 0] <= 0).int()
        found: np.ndarray = predicted.to(torch.int32).cpu().numpy()
        return found

    @functools.cached_property
    def _shares(self) -> Float[np.ndarray, "b classes"]:
        """Of the cells, those predicted as each class."""
        counts = [np.bincount(row[row >= 0].ravel(), minlength=self._classes) for row in self._predicted]
        shares: np.ndarray = np.stack(counts) / self._predicted[0].size
        return shares

    def _chosen(self, row: int, target: Target) -> list[tuple[int, BoolArray]]:
        """Classes and cells that a target names."""
        match target.about:
            case PlacedRegion(index, cells) if cells is not None:
                return [self._placed(row, index, cells)]
            case PlacedRegion(index, None) | Region(index, None):
                indices = self._classes_of(row, Predicted() if index is None else ClassIndex(index))
            case about:
                indices = self._classes_of(row, about)
        return [(index, self._cells_of(row, index)) for index in indices]

    def _classes_of(self, row: int, about: About) -> list[int]:
        shares = self._shares[row]
        ranking = [int(index) for index in np.argsort(-shares, kind="stable")]
        present = [index for index in ranking if shares[index] > 0]
        match about:
            case Predicted():
                return ranking[:1]
            case ClassIndex(index):
                check_class(index, self._classes)
                return [index]
            case KthClass(k):
                check_count(k, self._classes)
                return [ranking[k - 1]]
            case TopClasses(k):
                check_count(k, self._classes)
                return present[:k] or ranking[:1]
            case ClassesAbove(threshold):
                above = [index for index in present if shares[index] > threshold]
                if not above:
                    raise none_above("class's share of the cells", threshold, float(shares.max()))
                return above
        raise no_target(_KIND, about, _OFFERED)

    def _cells_of(self, row: int, index: int) -> BoolArray:
        cells: BoolArray = self._predicted[row] == index
        if not cells.any():
            shares = self._shares[row]
            present = [int(other) for other in np.argsort(-shares, kind="stable") if shares[other] > 0]
            known = ", ".join(map(str, present[:12])) or "none"
            raise InvalidRequest(
                Reason.FIELD_INVALID,
                f"no cell is predicted as class {index}; classes that are, largest first: {known}; "
                "name the pixels to sum over as target.region",
                metadata={"value": index, "known": known},
            )
        return cells

    def _placed(self, row: int, index: int | None, pixels: BoolArray) -> tuple[int, BoolArray]:
        """A region's class and the cells any chosen pixel falls in."""
        cells = _on_grid(pixels, self._predicted[row].shape)
        if index is None:
            predicted = self._predicted[row][cells]
            counts = np.bincount(predicted[predicted >= 0], minlength=self._classes)
            index = int(counts.argmax())
        check_class(index, self._classes)
        return index, cells

    def _over(self, row: int, cells: BoolArray) -> np.ndarray:
        """Each class's sum over some cells, (classes)."""
        mask = torch.from_numpy(cells).to(self._logits.device)
        sums: np.ndarray = widened(self._logits[row].detach())[:, mask].sum(dim=1).cpu().numpy()
        return sums

    def _aim(
        self,
        row: int,
        target: Target,
        terms: tuple[tuple[int, float], ...],
        cells: BoolArray,
        *,
        rank: int = 0,
        count: int = 1,
        by_probability: bool = False,
    ) -> Aim:
        told = ResolvedTarget(
            class_index=terms[0][0],
            score=target.score,
            value=0.0,
            rank=rank,
            count=count,
            polarity=Polarity.FOR,
            other_class_index=terms[1][0] if len(terms) > 1 else None,
            cells=int(cells.sum()),
        )
        place = hashlib.blake2b(np.packbits(cells).tobytes(), digest_size=16).digest()
        key = (terms, by_probability, target.score, target.polarity, place)
        aim = Aim(target=told, key=key, weights=terms, by_probability=by_probability, cells=cells)
        value = float(weigh(self._logits[row : row + 1].detach(), [aim], has_sigmoid=self._classes == 1)[0])
        return dataclasses.replace(aim, target=dataclasses.replace(told, value=value, polarity=target.polarity))


def _on_grid(pixels: BoolArray, grid: tuple[int, ...]) -> BoolArray:
    """The cells of the output that any chosen pixel of the input falls in, (*grid)."""
    if pixels.ndim != len(grid):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"the region has {pixels.ndim} axes, and the model's output has cells along {len(grid)}; "
            "a mask has the input's spatial axes",
            metadata={"axes": pixels.ndim, "wanted": len(grid)},
        )
    if not pixels.any():
        raise InvalidRequest(
            Reason.FIELD_INVALID, "the region chooses no pixel of the model's input; choose at least one"
        )
    pooled = _POOLS[len(grid)](torch.from_numpy(np.ascontiguousarray(pixels)).float()[None, None], list(grid))[0, 0]
    cells: BoolArray = pooled.numpy() > 0
    return cells

"""The number that is differentiated: weighted sums of class scores, for a whole batch whose rows want different ones.

`classes.py`, `dense.py` and `sequence.py` call `weigh` with the class logits of every row; what it does to one row does not
depend on any other, so that a row's gradient has the same bits in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts.readout import Aim
from camserve.server.jobs import Polarity, Score

__all__ = ["contrasted", "signs", "weigh", "widened"]

# pytorch-grad-cam's, in `FinerWeightedTarget`.
_SHARE_EPSILON = 1e-9


def widened(values: Tensor) -> Tensor:
    """Half formats as float32, so that a softmax near 0 or 1 keeps its derivative up to this point."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def weigh(
    logits: Float[Tensor, "b classes *grid"], aims: Sequence[Aim | None], *, has_sigmoid: bool = False
) -> Float[Tensor, "b"]:
    """Each row's weighted sum of class scores over its cells, turned by its polarity; zero for rows without an aim.

    Args:
        logits: of the whole batch; rows without an aim get a gradient of zero even where theirs are not finite.
        aims: one entry for each row; `cells` has the grid's shape, or is None for the whole grid.
        has_sigmoid: classes are independent: a class's probability is its sigmoid.
    """
    wide = widened(logits)
    if len(aims) != len(wide):
        raise ValueError(f"{len(aims)} aims for a batch of {len(wide)} rows; give one for each row, or None")
    spread = (-1,) + (1,) * (wide.ndim - 2)  # (b) against (b *grid).
    if None in aims:
        wanted = torch.tensor([aim is not None for aim in aims], device=wide.device)
        wide = wide.where(wanted.view(*spread, 1), 0)
    pick = _picker(wide, aims, spread, has_sigmoid=has_sigmoid)
    rows = [_signed(aim) for aim in aims]
    count = max(map(len, rows))
    # Shorter rows repeat their first class with weight 0: no other value of theirs is touched.
    indices = torch.tensor([[c for c, _ in row] + [row[0][0]] * (count - len(row)) for row in rows], device=wide.device)
    weights = wide.new_tensor([[w for _, w in row] + [0.0] * (count - len(row)) for row in rows])
    weighed = [pick(indices[:, term]) * weights[:, term].view(spread) for term in range(count)]
    total = weighed[0]
    for term in weighed[1:]:
        total = total + term
    by_share = [aim is not None and aim.by_probability for aim in aims]
    if any(by_share):
        is_shared = torch.tensor(by_share, device=wide.device)
        is_term = torch.tensor([[term < len(row) for term in range(count)] for row in rows], device=wide.device)
        total = torch.where(is_shared.view(spread), _by_share(wide, indices, is_term, weighed, spread), total)
    return _over_cells(total, aims)


def signs(aims: Sequence[Aim | None], like: Tensor) -> Float[Tensor, "b"]:
    """-1 for the rows that look for evidence against their target, 1 for the others."""
    return like.new_tensor(
        [-1.0 if aim is not None and aim.target.polarity is Polarity.AGAINST else 1.0 for aim in aims]
    )


def contrasted(
    logits: npt.NDArray[np.floating], index: int, contrast: Contrast
) -> tuple[tuple[int, float], ...]:  # fmt: skip
    """The terms of a class less its nearest classes (Finer-CAM, arXiv:2501.11309).

    Nearest are those whose logits are closest, ties by lower index, whatever score is differentiated: a saturated softmax no
    longer tells classes apart.

    Args:
        logits: (classes), at least two.
        index: the class.
        contrast: how many of the nearest, fewer if there are not as many, and their weight together. By probability, each term
            has the whole weight, of which `weigh` takes its share.
    """
    distances = np.abs(logits - logits[index])
    nearest = [int(other) for other in np.argsort(distances, kind="stable") if other != index][: contrast.classes]
    each = contrast.weight if contrast.by_probability else contrast.weight / max(len(nearest), 1)
    return ((index, 1.0), *((other, -each) for other in nearest))


def _signed(aim: Aim | None) -> Sequence[tuple[int, float]]:
    """The terms of an aim, turned by its polarity; every number behind them is linear in them."""
    if aim is None:
        return ((0, 0.0),)
    if aim.target.polarity is Polarity.AGAINST:
        return [(index, -weight) for index, weight in aim.weights]
    return aim.weights


def _picker(
    wide: Float[Tensor, "b classes *grid"], aims: Sequence[Aim | None], spread: tuple[int, ...], *, has_sigmoid: bool
) -> Callable[[Tensor], Tensor]:
    """Makes the function that takes one class a row, (b), to the score each row wants of it, (b *grid)."""
    scores = [aim.target.score if aim is not None else Score.LOGIT for aim in aims]
    chosen: list[tuple[Tensor, Tensor]] = []
    if Score.SOFTMAX in scores:
        probabilities = wide.sigmoid() if has_sigmoid else wide.softmax(dim=1)
        chosen.append((_mask(scores, Score.SOFTMAX, wide).view(spread), probabilities))
    if Score.REST in scores:
        logarithms = functional.logsigmoid(wide) if has_sigmoid else wide.log_softmax(dim=1)
        chosen.append((_mask(scores, Score.REST, wide).view(spread), wide + logarithms))

    def pick(index: Tensor) -> Tensor:
        picked = _gathered(wide, index)
        for mask, values in chosen:
            picked = torch.where(mask, _gathered(values, index), picked)
        return picked

    return pick


def _by_share(
    wide: Float[Tensor, "b classes *grid"],
    indices: Tensor,
    is_term: Tensor,
    weighed: Sequence[Tensor],
    spread: tuple[int, ...],
) -> Float[Tensor, "b *grid"]:
    """pytorch-grad-cam's Finer-CAM: sum of p_i (y_c - alpha y_i) over (sum of p_i + 1e-9), the p_i differentiated too."""
    probabilities = wide.softmax(dim=1)
    numerator = torch.zeros_like(weighed[0])
    denominator = torch.zeros_like(weighed[0])
    for term in range(1, len(weighed)):
        share = _gathered(probabilities, indices[:, term]) * is_term[:, term].view(spread)
        numerator = numerator + share * (weighed[0] + weighed[term])
        denominator = denominator + share
    return numerator / (denominator + _SHARE_EPSILON)


def _over_cells(total: Float[Tensor, "b *grid"], aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
    if total.ndim == 1:
        return total
    if any(aim is not None and aim.cells is not None for aim in aims):
        everywhere = np.ones(total.shape[1:], dtype=np.bool_)
        masks = [everywhere if aim is None or aim.cells is None else aim.cells for aim in aims]
        total = total * torch.from_numpy(np.stack(masks)).to(total.device)
    return total.flatten(1).sum(dim=1)


def _gathered(values: Float[Tensor, "b classes *grid"], index: Tensor) -> Float[Tensor, "b *grid"]:
    grid = values.shape[2:]
    return values.gather(1, index.view(-1, 1, *[1] * len(grid)).expand(-1, 1, *grid))[:, 0]


def _mask(scores: Sequence[Score], wanted: Score, like: Tensor) -> Tensor:
    return torch.tensor([score is wanted for score in scores], device=like.device)

"""How a model's outputs are read: what is told as the prediction, what a target means, and the number that is differentiated.

One `Readout` is made from the outputs of one pass, by `read` in `__init__.py`; there is a class for each kind of output.
`passes.py` asks it for readings, then for the aims of each spec, then for scores; amplified methods score other inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods import Contrast
from camserve.server.jobs import BoolArray, Box, FloatArray, Reading, ResolvedTarget, Target

__all__ = ["Aim", "Readout"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Aim:
    """What is differentiated for one map of one row.

    An aim belongs to the row it was made for but holds only what its score needs, so that it also scores other inputs.

    Attributes:
        target: as the caller is told.
        key: equal for two aims of a row exactly if their scores are the same number.
        weights: classes and the weight of each one's score in the sum, such as ((3, 1.0), (5, -0.6)).
        by_probability: the weights of the classes after the first are multiplied by their share of those classes' probabilities,
            which is differentiated too; see `Contrast` and `terms.weigh`.
        cells: of a dense output, those summed over, in the output's own shape.
        step: of a sequence.
        box: of a detector, the matched detection's box in pixels of the input: other inputs are matched to it anew.
        detection: of a detector, the place of the matched detection in the row's own output; it counts only where that box and
            class still are in that place.
        vector: of an embedding, what the cosine is taken with.
    """

    target: ResolvedTarget
    key: Hashable
    weights: tuple[tuple[int, float], ...] = ()
    by_probability: bool = False
    cells: BoolArray | None = None
    step: int | None = None
    box: Box | None = None
    detection: int | None = None
    vector: FloatArray | None = None


class Readout(Protocol):
    """The outputs of one pass, read as one kind.

    Whole-batch operations only, each touching a row's own values alone: the scores and gradients of a row have the same bits
    whatever other rows ask for.
    """

    @property
    def requires_grad(self) -> bool:
        """Whether scores can be differentiated."""
        ...

    def readings(self) -> Sequence[Reading]:
        """What is told of each row; copies to the host, once. A row whose numbers are not finite still has a reading."""
        ...

    def aims(self, row: int, target: Target, contrast: Contrast | None = None) -> tuple[Aim, ...]:
        """What a target means for a row: one aim for each map, best first; ties by lower index.

        Args:
            row: place in the batch.
            target: with `Reference`s and `Phrase`s already turned into an `Embedding`, regions and boxes placed on the input.
            contrast: how the method turns each class into a contrast with its nearest ones.

        Raises:
            InvalidRequest: a class, k or step outside what the model has, an empty region, nothing above a threshold.
            Unsupported: this kind of output has no such target; the message lists those it has.
            NotFound: no detection matches.
            ExecutionFailed: the row's numbers are not finite.
        """
        ...

    def scores(self, aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
        """The score of each row's aim, turned by its polarity, differentiable; zero, with zero gradient, for rows without one.

        Half formats are widened, so that a softmax near 0 or 1 keeps its derivative up to this point. Aims need not have been
        made by this readout: an amplified method scores n other inputs by n times one aim.
        """
        ...

    def detach(self) -> None:
        """Frees the graph; readings stay."""
        ...

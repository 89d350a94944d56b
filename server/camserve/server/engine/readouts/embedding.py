"""Embeddings: a vector for each row, explained by what makes it similar to another one.

`read` in `__init__.py` makes an `EmbeddingReadout` for each pass. References and phrases have become vectors by then.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts.readout import Aim
from camserve.server.engine.readouts.refusals import no_contrast, no_score, no_target, not_finite
from camserve.server.engine.readouts.terms import signs, widened
from camserve.server.errors import ExecutionFailed, InvalidRequest, Reason
from camserve.server.jobs import Embedding, FloatArray, OutputKind, Reading, ResolvedTarget, Score, Target

__all__ = ["EmbeddingReadout"]

_KIND = OutputKind.EMBEDDING
# Below it a vector counts as zero, and its cosine with another is 0, not NaN.
_SMALLEST_NORM = 1e-12


class EmbeddingReadout:
    """Reads (b, dimensions); a score is the cosine with an aim's vector."""

    def __init__(self, vectors: Float[Tensor, "b dimensions"]) -> None:
        self._vectors = vectors

    @property
    def requires_grad(self) -> bool:
        """Whether scores can be differentiated."""
        return self._vectors.requires_grad

    def readings(self) -> Sequence[Reading]:
        """The vectors."""
        none = np.empty(0, dtype=np.float32)
        return [Reading(kind=_KIND, scores=row, probabilities=none) for row in self._host.float().numpy()]

    def aims(self, row: int, target: Target, contrast: Contrast | None = None) -> tuple[Aim, ...]:
        """One aim; see `Readout.aims`. A model of this kind predicts nothing, so a vector must be given."""
        if not isinstance(target.about, Embedding):
            raise no_target(_KIND, target.about, ("embedding", "text"))
        if target.score is not Score.LOGIT:
            raise no_score(_KIND, target.score, (Score.LOGIT,))
        if contrast is not None:
            raise no_contrast(_KIND, "a similarity has none")
        own = self._host[row]
        if not own.isfinite().all():
            raise not_finite("numbers")
        if float(own.norm()) < _SMALLEST_NORM:
            raise ExecutionFailed(
                Reason.MODEL_FAILED, "the model's embedding of this input is zero: it is similar to nothing"
            )
        vector = np.asarray(target.about.vector, dtype=np.float32)
        _check(vector, len(own))
        value = float(own @ torch.from_numpy(_unit(vector)) / own.norm())
        told = ResolvedTarget(class_index=None, score=target.score, value=value, polarity=target.polarity)
        return (Aim(target=told, key=(vector.tobytes(), target.polarity), vector=vector),)

    def scores(self, aims: Sequence[Aim | None]) -> Float[Tensor, "b"]:
        """The cosines; see `Readout.scores`."""
        wide = widened(self._vectors)
        if len(aims) != len(wide):
            raise ValueError(f"{len(aims)} aims for a batch of {len(wide)} rows; give one for each row, or None")
        nothing = np.zeros(wide.shape[1])
        units = np.stack([nothing if aim is None or aim.vector is None else _unit(aim.vector) for aim in aims])
        wanted = torch.tensor([aim is not None for aim in aims], device=wide.device)
        wide = wide.where(wanted[:, None], 0)
        norms = torch.linalg.vector_norm(wide, dim=1).clamp_min(_SMALLEST_NORM)
        products = (wide * torch.from_numpy(units).to(wide)).sum(dim=1)
        cosines: Float[Tensor, "b"] = products / norms * signs(aims, wide)
        return cosines

    def detach(self) -> None:
        """Frees the graph; readings stay."""
        self._vectors = self._vectors.detach()

    @functools.cached_property
    def _host(self) -> Float[Tensor, "b dimensions"]:
        """One copy for readings and targets, which scores alone do not need."""
        return self._vectors.detach().to("cpu", torch.float64)


def _unit(vector: FloatArray) -> np.ndarray:
    """The vector at length 1, in double precision: squares of large components overflow single."""
    wide = vector.astype(np.float64)
    unit: np.ndarray = wide / np.linalg.norm(wide)
    return unit


def _check(vector: FloatArray, dimensions: int) -> None:
    if len(vector) != dimensions:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"the vector has {len(vector)} components, and the model's embedding has {dimensions}; "
            "compare vectors of the same model",
            metadata={"components": len(vector), "dimensions": dimensions},
        )
    if not np.isfinite(vector).all() or not vector.any():
        raise InvalidRequest(Reason.FIELD_INVALID, "the vector is zero or not finite, so that its cosine is undefined")

"""Methods that read a transformer's attention: probabilities (b heads queries keys) of every layer, first to last.

A map has a cell for each key that lies on the grid; `Evidence.prefix` tells how many stand before those, and `Evidence.grid` how
the others lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.method import Evidence, Family, Method, Need, Reads, Whole, WorkClass
from camserve.server.cam.methods.numerics import given, positive_part, widen
from camserve.server.errors import Reason, Unsupported
from camserve.server.jobs import Profile

__all__ = ["ATTENTION"]


def _legrad(evidences: Sequence[Evidence]) -> Float[Tensor, "b *grid"]:
    """The mean over layers of mean_heads,queries ReLU(dy/dA): how much each key could add by being attended to more.

    The paper, and torchcam's class, differentiate for each layer a score of its own: that layer's tokens put through the head.
    Which module is a head cannot be told of any program, so y is the model's own score here. In the last layer they are the same
    where the head reads the tokens in the same way.
    """
    layers = [positive_part(given(evidence.gradient, Need.GRADIENT)).mean(dim=(1, 2)) for evidence in evidences]
    return torch.stack([_on_grid(keys, evidence) for keys, evidence in zip(layers, evidences, strict=True)]).mean(dim=0)


def _attention_rollout(evidences: Sequence[Evidence]) -> Float[Tensor, "b *grid"]:
    """The product of all layers' (mean_heads A + I), rows divided by their sums: how tokens reach the last layer's.

    The map is the row of the class token, the first one; without prefix tokens, the mean of all rows.

    Raises:
        Unsupported: layers attend over different tokens, so that their product has no meaning.
    """
    rollout: Tensor | None = None
    for evidence in evidences:
        attention = widen(evidence.activation).mean(dim=1)
        queries, keys = attention.shape[1:]
        if queries != keys or (rollout is not None and keys != rollout.shape[1]):
            raise Unsupported(
                Reason.METHOD_UNSUPPORTED_BY_MODEL,
                f"attention-rollout multiplies the attention of all layers, which must all be among the same tokens; one has "
                f"{queries} queries and {keys} keys; legrad needs no more than keys that lie on one grid",
                metadata={"queries": queries, "keys": keys},
            )
        with_skip = attention + torch.eye(keys, dtype=attention.dtype, device=attention.device)
        layer = with_skip / with_skip.sum(dim=2, keepdim=True)
        rollout = layer if rollout is None else layer @ rollout
    if rollout is None:
        raise ValueError("attention-rollout needs the attention of at least one layer")
    return _on_grid(rollout[:, 0] if evidences[0].prefix else rollout.mean(dim=1), evidences[0])


def _on_grid(keys: Float[Tensor, "b keys"], evidence: Evidence) -> Float[Tensor, "b *grid"]:
    """Drops the prefix and lays the other keys on the grid, or leaves them a sequence if there is none.

    Raises:
        Unsupported: so many keys do not fill the grid, as where windows or pooling change what is attended to.
    """
    places = keys[:, evidence.prefix :]
    grid = evidence.grid or (places.shape[1],)
    if math.prod(grid) != places.shape[1] or not places.shape[1]:
        raise Unsupported(
            Reason.METHOD_UNSUPPORTED_BY_MODEL,
            f"an attention over {keys.shape[1]} keys, {evidence.prefix} of them before the grid, does not lie on a grid of "
            f"{' x '.join(map(str, grid))}; methods that read attention need global attention over the image's patches",
            metadata={"keys": keys.shape[1], "prefix": evidence.prefix, "grid": grid},
        )
    return places.reshape(places.shape[0], *grid)


ATTENTION: tuple[Method, ...] = (
    Method(
        slug="legrad",
        title="LeGrad",
        paper="Bousselham et al., LeGrad, arXiv:2404.03214: mean over layers, heads and queries of ReLU(dy/dA), y the model's",
        reads=Reads.ATTENTION,
        needs=frozenset({Need.GRADIENT}),
        rectifies=False,
        family=Family.ATTENTION,
        work=WorkClass.ONE_GRADIENT,
        cost="one gradient",
        arithmetic=Whole(_legrad),
        # torchcam has a LeGrad, but one of layer scores, which nothing here can follow.
        absent_from=frozenset({Profile.PYTORCH_GRAD_CAM, Profile.TORCHCAM}),
    ),
    Method(
        slug="attention-rollout",
        title="Attention rollout",
        paper="Abnar and Zuidema, Quantifying Attention Flow, arXiv:2005.00928: product of all (A + I), rows summing to 1",
        reads=Reads.ATTENTION,
        rectifies=False,
        has_target=False,
        family=Family.ATTENTION,
        work=WorkClass.FORWARD_ONLY,
        cost="one forward",
        arithmetic=Whole(_attention_rollout),
        absent_from=frozenset({Profile.PYTORCH_GRAD_CAM, Profile.TORCHCAM}),
    ),
)

"""What affine layers add to their outputs, and the refusal of models of which that cannot be told.

`eager_biases.py` asks for modules, `export_biases.py` for graph nodes; FullGrad (arXiv:1905.00780, equation 3) needs them all, or
its parts do not add up to the score.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.engine.program import ProgramKind
from camserve.server.errors import Reason, Unsupported

__all__ = ["incomplete", "norm_constant"]


def norm_constant(
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    mean: Float[Tensor, " c"],
    variance: Float[Tensor, " c"],
    epsilon: float,
) -> Float[Tensor, " c"]:
    """What a batch normalisation with fixed statistics adds: its output where its input is zero (arXiv:1502.03167)."""
    constant = -mean * torch.rsqrt(variance + epsilon)
    if weight is not None:
        constant = constant * weight
    return constant if bias is None else constant + bias


def incomplete(kind: ProgramKind, place: str, problem: str) -> Unsupported:
    """The refusal to list biases.

    Args:
        kind: the program's kind.
        place: which layer, with its class or operator.
        problem: why its constant cannot be told.
    """
    return Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"the biases of this {kind} program cannot be listed completely: {place} {problem}; only models of convolutions, linear "
        "layers and batch normalisations can be explained by bias gradients; use vanilla-backprop, or grad-cam at a layer",
        metadata={"kind": kind, "place": place},
    )

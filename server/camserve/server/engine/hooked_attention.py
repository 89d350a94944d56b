"""Computes attention step by step, so that its probabilities are there to be tapped and differentiated.

Arrives: the calls of fused attention and of softmax that a forward makes. Leaves: the same results but for the last bits, and
every attention's probabilities in order. `eager_attention.py` redirects Python calls here, `export_attention.py` graph nodes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from camserve.server.engine.program import BackwardRule, ProgramKind
from camserve.server.errors import Reason, Unsupported

__all__ = ["Attentions"]


class Attentions:
    """The attentions of one forward.

    Attributes:
        values: probabilities, (b, heads, queries, keys), in order of execution; each requires grad, if gradients are enabled.

    Args:
        kind: named by refusals.
        rows: of the batch.
    """

    def __init__(self, kind: ProgramKind, rows: int) -> None:
        self.values: list[Tensor] = []
        self._kind = kind
        self._rows = rows
        self._odd: list[tuple[int, ...]] = []

    def attend(  # noqa: PLR0913 - PyTorch's own signature.
        self,
        query: Float[Tensor, "*batch q d"],
        key: Float[Tensor, "*batch k d"],
        value: Float[Tensor, "*batch k e"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - PyTorch's own signature.
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Float[Tensor, "*batch q e"]:
        """What `scaled_dot_product_attention` documents as its equivalent (arXiv:1706.03762, equation 1), with a tap.

        A query that the mask leaves no key gives zeros, as the fused kernels do.
        """
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = (query * factor) @ key.transpose(-2, -1)
        allowed: Bool[Tensor, "*batch q k"] | None = None
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = attn_mask
        elif attn_mask is not None:
            scores = scores + attn_mask
            allowed = ~scores.isneginf()
        if allowed is None:
            probabilities = scores.softmax(-1)
        else:
            is_blind = ~allowed.any(-1, keepdim=True)
            scores = scores.masked_fill(~allowed, -math.inf).masked_fill(is_blind, 0.0)
            probabilities = scores.softmax(-1).masked_fill(is_blind, 0.0)
        probabilities = self._kept(probabilities)
        if dropout_p > 0:
            probabilities = functional.dropout(probabilities, dropout_p)
        return probabilities @ value

    def softmax(self, probabilities: Tensor, dim: int) -> Tensor:
        """Keeps the result of a softmax if it is an attention's, told by its shape: as many keys as queries, over the keys.

        Returns:
            What to go on with: a copy, which the model may write to, or the result itself if it is no attention.
        """
        is_over_keys = probabilities.is_floating_point() and dim in {-1, probabilities.dim() - 1}
        if not is_over_keys or probabilities.dim() not in {3, 4} or probabilities.shape[-1] != probabilities.shape[-2]:
            return probabilities
        return self._kept(probabilities).clone()

    def _kept(self, probabilities: Tensor) -> Tensor:
        shape = probabilities.shape
        if len(shape) == 4 and shape[0] == self._rows:
            kept = probabilities
        elif len(shape) == 3 and shape[0] % self._rows == 0:  # Heads are folded into the batch, row by row.
            kept = probabilities.reshape(self._rows, -1, *shape[1:])
        else:
            self._odd.append(tuple(shape))
            return probabilities
        if torch.is_grad_enabled() and not kept.requires_grad:
            # The earliest tap on its path: nothing before it is differentiated.
            kept = kept.detach().requires_grad_()
        self.values.append(kept)
        return kept.reshape(shape)

    def check(self) -> None:
        """Refuses a forward whose attentions are not all known, or that has none.

        Raises:
            Unsupported: the message says what was found.
        """
        if self._odd:
            problem = (
                f"one has probabilities of shape {self._odd[0]} for {self._rows} rows, as attention within windows has, "
                "and these belong to no row as a whole"
            )
        elif not self.values:
            problem = "no attention is computed by it, neither fused nor as a softmax over as many keys as queries"
        else:
            return
        raise self.refusal(problem)

    def refusal(self, problem: str) -> Unsupported:
        """The refusal of a program whose attention cannot be tapped."""
        return Unsupported(
            Reason.METHOD_UNSUPPORTED_BY_MODEL,
            f"rule '{BackwardRule.ATTENTION}' taps the attention probabilities of this {self._kind} program, but {problem}; "
            "use a method of gradients or activations, such as grad-cam at a layer",
            metadata={"rule": BackwardRule.ATTENTION, "kind": self._kind},
        )

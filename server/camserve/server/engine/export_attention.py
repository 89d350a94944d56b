"""Redirects the attention nodes of an exported program to `hooked_attention.py` during one forward.

`ExportProgram.capture` enters `watched_nodes` around its forward. How nodes are exchanged is told in `export_nodes.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from camserve.server.engine.export_nodes import exchanged
from camserve.server.engine.hooked_attention import Attentions
from camserve.server.engine.program import BackwardRule, ProgramKind

__all__ = ["watched_nodes"]

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
# Kernels that were chosen when the model was exported, for some device and input; no two take the same arguments.
_CHOSEN = ("_attention", "_attention_cudnn", "_multi_head_attention", "_encoder_layer_fwd", "_masked_softmax")


@contextlib.contextmanager
def watched_nodes(module: nn.Module, rows: int) -> Iterator[list[Tensor]]:
    """Computes attention step by step for the forward in the body.

    Args:
        module: an unflattened export.
        rows: of the batch.

    Yields:
        The probabilities, (b, heads, queries, keys), as far as the forward has come.

    Raises:
        Unsupported: there is no attention, some of another shape, or a kernel that cannot be taken apart.
    """
    attentions = Attentions(ProgramKind.EXPORT, rows)

    def replacement(node: fx.Node) -> Callable[..., Any] | None:
        schema = getattr(node.target, "_schema", None)
        name = str(schema.name).rpartition("::")[2] if schema is not None else ""
        if name == "scaled_dot_product_attention":
            return attentions.attend
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            return _returning_two(attentions)
        if name in _SOFTMAX:
            return _softmax(attentions, node.target)  # type: ignore[arg-type]
        if name.endswith(_CHOSEN):
            raise attentions.refusal(
                f"it was exported with {node.target}, which cannot be taken apart; export it again without decomposing it, under "
                "torch.backends.mha.set_fastpath_enabled(False)"
            )
        return None

    with exchanged(module, replacement, f"rule '{BackwardRule.ATTENTION}'"):
        yield attentions.values
    attentions.check()


def _softmax(attentions: Attentions, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def softmax(value: Tensor, dim: int, *options: Any, **named: Any) -> Tensor:
        return attentions.softmax(operator(value, dim, *options, **named), dim)

    return softmax


def _returning_two(attentions: Attentions) -> Callable[..., tuple[Tensor, None]]:
    """What decomposing leaves of fused attention on a CPU; its second result serves its own backward only."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - the operator's signature.
        **options: Any,
    ) -> tuple[Tensor, None]:
        return attentions.attend(
            query, key, value, options.pop("attn_mask", None), dropout_p, is_causal, **options
        ), None

    return attend

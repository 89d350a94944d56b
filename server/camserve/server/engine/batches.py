"""Which batch sizes a program takes, and whether the rows of a batch leave each other alone.

`probe.py` asks at load. An archive traced or exported with one batch size refuses others, or worse returns another number of
rows; a model with batch statistics gives a row other outputs when its neighbours change, and must run alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from camserve.server.engine.look import FAILURES, message_of
from camserve.server.engine.program import Program
from camserve.server.errors import ExecutionFailed, Reason

__all__ = ["coupling", "make_batch", "try_sizes"]

# Tried when none of the sizes asked for works: archives that were traced with a batch of their own.
_LIKELY_SIZES = (1, 2, 4, 8, 16, 32, 64)


def make_batch(sample: Tensor, size: int, *, seed: int = 0) -> Tensor:
    """Makes a batch of unlike rows.

    Args:
        sample: (n, c, *space).
        size: rows to make: the sample's own as far as they go, then the same ones with noise.
        seed: other seeds give rows with other noise, from the first row on.
    """
    rows = sample[[row % sample.shape[0] for row in range(size)]].clone()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator).to(device=rows.device, dtype=rows.dtype)
    spread = float(sample.float().std(correction=0)) or 1.0
    kept = min(size, sample.shape[0]) if seed == 0 else 0
    rows[kept:] += spread * noise[kept:]
    return rows


def try_sizes(program: Program, sample: Tensor, sizes: Iterable[int]) -> Mapping[int, Any]:
    """Runs the program on batches of several sizes.

    Returns:
        The outputs by batch size, smallest first, of the sizes that work; at least one.

    Raises:
        ExecutionFailed: none works.
    """
    outputs: dict[int, Any] = {}
    failures: list[str] = []
    wanted = sorted(set(sizes))
    for size in itertools.chain(wanted, (size for size in _LIKELY_SIZES if size not in wanted)):
        if size > wanted[-1] and outputs:
            break
        try:
            found = program.run(make_batch(sample, size))
        except FAILURES as error:
            failures.append(f"{size} rows: {message_of(error)}")
            continue
        rows = {leaf.shape[0] if leaf.ndim else 0 for leaf in _tensors(found)}
        if rows == {size}:
            outputs[size] = found
        else:
            failures.append(f"{size} rows: outputs have {', '.join(map(str, sorted(rows))) or 'no'} rows")
    if not outputs:
        raise ExecutionFailed(
            Reason.MODEL_FAILED,
            f"the model does not run on an input of shape {tuple(sample.shape[1:])} at any batch size; {'; '.join(failures)}",
            metadata={"inputShape": tuple(sample.shape[1:])},
        )
    return outputs


def coupling(program: Program, sample: Tensor, size: int, outputs: Any) -> str:
    """Says how the rows of a batch influence each other; empty if they do not.

    The first row keeps its place while all its neighbours change, and then the last one; both must keep their bits.

    Args:
        program: looked at.
        sample: as for `make_batch`.
        size: of the batch.
        outputs: of the program on `make_batch(sample, size)`.
    """
    if size == 1:
        return ""
    inputs, strangers = make_batch(sample, size), make_batch(sample, size, seed=1)
    strangers = strangers * 3 + 1  # Unlike neighbours make unlike statistics.
    is_moved = False
    for row in (0, size - 1):
        mixed = strangers.clone()
        mixed[row] = inputs[row]
        is_moved |= not _is_equal_row(outputs, program.run(mixed), row)
    if not is_moved:
        return ""
    again = program.run(inputs)
    if all(_is_equal_row(outputs, again, row) for row in range(size)):
        return "a row's output depends on its neighbours in the batch, so every request runs alone"
    return "the same input gives different outputs, so every request runs alone and maps cannot be reproduced"


def _is_equal_row(left: Any, right: Any, row: int) -> bool:
    pairs = zip(_tensors(left), _tensors(right), strict=True)
    return all(torch.equal(a[row].nan_to_num(), b[row].nan_to_num()) for a, b in pairs)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]

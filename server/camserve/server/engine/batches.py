"""Which batch sizes a program takes, and whether the rows of a batch leave each other alone.

`probe.py` asks at load. An archive traced or exported with one batch size refuses others, or worse returns another number of
rows; a model with batch statistics gives a row other outputs when its neighbours change, and must run alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from camserve.server.engine.look import FAILURES, message_of
from camserve.server.engine.program import Program
from camserve.server.engine.readouts import select_detections
from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import OutputKind

__all__ = ["coupling", "make_batch", "try_sizes"]

# Tried when none of the sizes asked for works: archives that were traced with a batch of their own.
_LIKELY_SIZES = (1, 2, 4, 8, 16, 32, 64)


def make_batch(sample: Tensor, size: int, *, seed: int = 0) -> Tensor:
    """Makes a batch of unlike rows.

    Args:
        sample: (n, c, *space).
        size: rows to make: the sample's own as far as they go, then the same ones with noise; whole numbers get none.
        seed: other seeds give rows with other noise, from the first row on.
    """
    rows = sample[[row % sample.shape[0] for row in range(size)]].clone()
    if not rows.is_floating_point():
        return rows
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator).to(device=rows.device, dtype=rows.dtype)
    spread = float(sample.float().std(correction=0)) or 1.0
    kept = min(size, sample.shape[0]) if seed == 0 else 0
    rows[kept:] += spread * noise[kept:]
    return rows


def try_sizes(
    program: Program,
    samples: Sequence[Tensor],
    sizes: Iterable[int],
    kind: OutputKind = OutputKind.CLASSIFICATION,
    output_path: str = "",
) -> Mapping[int, Any]:
    """Runs the program on batches of several sizes.

    Args:
        program: looked at.
        samples: of each input, as for `make_batch`.
        sizes: wanted.
        kind: of the output; all tensors of a batch have its rows, but a detector returns a list with an entry for each.
        output_path: to that list.

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
            found = program.run(*(make_batch(sample, size) for sample in samples))
            rows = _row_counts(found, kind, output_path)
        except FAILURES as error:
            failures.append(f"{size} rows: {message_of(error)}")
            continue
        if rows == {size}:
            outputs[size] = found
        else:
            failures.append(f"{size} rows: outputs have {', '.join(map(str, sorted(rows))) or 'no'} rows")
    if not outputs:
        shape = tuple(samples[0].shape[1:])
        raise ExecutionFailed(
            Reason.MODEL_FAILED,
            f"the model does not run on an input of shape {shape} at any batch size; {'; '.join(failures)}",
            metadata={"inputShape": shape},
        )
    return outputs


def coupling(
    program: Program,
    samples: Sequence[Tensor],
    size: int,
    outputs: Any,
    kind: OutputKind = OutputKind.CLASSIFICATION,
    output_path: str = "",
) -> str:
    """Says how the rows of a batch influence each other; empty if they do not.

    The first row keeps its place while all its neighbours change, and then the last one; both must keep their bits.

    Args:
        program: looked at.
        samples: of each input, as for `make_batch`.
        size: of the batch.
        outputs: of the program on batches of that size.
        kind: of the output.
        output_path: as for `try_sizes`.
    """
    if size == 1:
        return ""
    inputs = [make_batch(sample, size) for sample in samples]
    strangers = [_unlike(make_batch(sample, size, seed=1)) for sample in samples]
    is_moved = False
    for row in (0, size - 1):
        mixed = [stranger.clone() for stranger in strangers]
        for mixture, own in zip(mixed, inputs, strict=True):
            mixture[row] = own[row]
        is_moved |= not _is_equal(
            _of_row(outputs, row, kind, output_path), _of_row(program.run(*mixed), row, kind, output_path)
        )
    if not is_moved:
        return ""
    again = program.run(*inputs)
    pairs = ([_of_row(found, row, kind, output_path) for found in (outputs, again)] for row in range(size))
    if all(_is_equal(first, second) for first, second in pairs):
        return "a row's output depends on its neighbours in the batch, so every request runs alone"
    return "the same input gives different outputs, so every request runs alone and maps cannot be reproduced"


def _unlike(rows: Tensor) -> Tensor:
    """Unlike neighbours make unlike statistics."""
    return rows * 3 + 1 if rows.is_floating_point() else rows


def _row_counts(outputs: Any, kind: OutputKind, output_path: str) -> set[int]:
    if kind is OutputKind.DETECTION:
        return {len(select_detections(outputs, output_path))}
    return {leaf.shape[0] if leaf.ndim else 0 for leaf in _tensors(outputs)}


def _of_row(outputs: Any, row: int, kind: OutputKind, output_path: str) -> list[Tensor]:
    """Every tensor of one row."""
    if kind is OutputKind.DETECTION:
        return list(select_detections(outputs, output_path)[row].values())
    return [leaf[row] for leaf in _tensors(outputs)]


def _is_equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True))


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]

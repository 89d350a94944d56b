"""A factory's model becomes an archive that answers as the model does, for any number of rows.

Arrives: a module and samples of its input. Leaves: a file in a folder, and how it was written. `export_command.py` calls
this; what leaves goes the way of any other archive from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from camserve.server.engine.batches import make_batch
from camserve.server.engine.export import load_export
from camserve.server.engine.look import FAILURES, message_of
from camserve.server.engine.program import Program
from camserve.server.engine.script import load_script
from camserve.server.errors import CamserveError

__all__ = ["ArchiveFormat", "Written", "write_archive"]

ArchiveFormat: TypeAlias = Literal["torchscript", "pt2"]

_CPU = torch.device("cpu")
_SAMPLE_ROWS = 2
# One row, those of the sample, and more: what was traced with a number of rows baked in gives another one away.
_TRIED_ROWS = (1, _SAMPLE_ROWS, 3)
# Of the largest output. The same kernels run in the same order, so that most archives answer bit for bit.
_CLOSE = 1e-5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An archive that was written.

    Attributes:
        path: of the file.
        how: `scripted`, `exported`, or `traced` with the reason why it was not scripted.
        deviation: largest difference of an output from the module's, relative to its largest.
    """

    path: Path
    how: str
    deviation: float


def write_archive(module: nn.Module, shape: Sequence[int], archive_format: ArchiveFormat, folder: Path) -> Written:
    """Writes the archive and compares its answers with the module's.

    Args:
        module: on the CPU; put in eval mode.
        shape: of one row of its input.
        archive_format: `torchscript` or `pt2`.
        folder: where the file goes.

    Raises:
        ValueError: it cannot be written so, or does not answer as the module; the text says what may be tried.
    """
    module.eval()
    sample = torch.randn((_SAMPLE_ROWS, *shape), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), _differentiable_attention():
        # torch warns of its own deprecations, and a tracer of what comparing the answers finds out.
        warnings.simplefilter("ignore")
        if archive_format == "pt2":
            return _exported(module, sample, folder / "model.pt2")
        return _scripted(module, sample, folder / "model.pt")


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Keeps torch's fused attention out of what is traced: it has no derivative, hence no explanation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _exported(module: nn.Module, sample: Tensor, path: Path) -> Written:
    try:
        batch = torch.export.Dim("batch")
        exported = torch.export.export(module, (sample,), dynamic_shapes=({0: batch},))
        torch.export.save(exported, path)
        deviation = _deviation(load_export(path, device=_CPU), module, sample)
    except Exception as error:  # torch.export raises whatever the model's code meets
        raise ValueError(
            f"torch.export cannot write it for any number of rows: {message_of(error)}; try --format torchscript"
        ) from error
    return Written(path=path, how="exported", deviation=deviation)


def _scripted(module: nn.Module, sample: Tensor, path: Path) -> Written:
    refusals = []
    ways: Mapping[str, Callable[[], Any]] = {
        "scripted": functools.partial(torch.jit.script, module),
        "traced": functools.partial(torch.jit.trace, module, sample, check_trace=False),
    }
    for how, made in ways.items():
        try:
            torch.jit.save(made(), str(path))
            deviation = _deviation(load_script(path, device=_CPU), module, sample)
        except Exception as error:  # noqa: BLE001 - the compiler raises whatever the model's code meets
            refusals.append(f"it cannot be {how}: {message_of(error)}")
            continue
        return Written(path=path, how="; ".join([*refusals, how]), deviation=deviation)
    raise ValueError(
        f"{'; '.join(refusals)}; try --format pt2, or name the factory itself in a model.toml, as [factory] name = …"
    )


def _deviation(program: Program, module: nn.Module, sample: Tensor) -> float:
    """How far the archive's answers are from the module's.

    Raises:
        ValueError: another structure, other shapes, or too far.
    """
    largest = 0.0
    for rows in _TRIED_ROWS:
        batch = make_batch(sample, rows)
        with torch.no_grad():
            expected = _leaves(module(batch.clone()))
        try:
            found = _leaves(program.run(batch))
        except (*FAILURES, CamserveError) as error:
            raise ValueError(f"its archive fails for {rows} rows: {message_of(error)}") from error
        if {path: value.shape for path, value in expected.items()} != {
            path: value.shape for path, value in found.items()
        }:
            raise ValueError(f"for {rows} rows its archive returns something of another form than the model")
        for path, value in expected.items():
            scale = float(value.abs().max()) if value.numel() else 0.0
            difference = float((found[path] - value).abs().max()) if value.numel() else 0.0
            largest = max(largest, difference / scale if scale else difference)
    if not largest <= _CLOSE:
        raise ValueError(f"its archive answers otherwise than the model, by {largest:.1e} of the largest output")
    return largest


def _leaves(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of an output by where they are, so that a scripted tuple equals one of Python."""
    match value:
        case Tensor():
            return {path: value.double()}
        case Mapping():
            parts = list(value.items())
        case list() | tuple():
            parts = list(enumerate(value))
        case _:
            return {}
    return {name: leaf for key, part in parts for name, leaf in _leaves(part, f"{path}.{key}").items()}

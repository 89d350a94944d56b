"""`.pt2` archives written by `torch.export.save` become a `Program`.

Arrives: a path or an open file. Leaves: an `ExportProgram`. The archive's flat graph is unflattened into modules again, since
hooks on `ExportedProgram.module()` never fire; outputs, activations and gradients stay bit-equal to the eager model's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch.export.passes import move_to_device_pass

from camserve.server.engine.export_attention import watched_nodes
from camserve.server.engine.export_biases import biases_of_graph
from camserve.server.engine.export_cut import ExportCut
from camserve.server.engine.export_flat import Flat, flatten
from camserve.server.engine.export_relu import gated_nodes
from camserve.server.engine.export_safety import check_archive
from camserve.server.engine.hooked import HookedProgram
from camserve.server.engine.hooked_biases import incomplete
from camserve.server.engine.hooked_relu import GATES
from camserve.server.engine.look import message_of
from camserve.server.engine.program import BackwardRule, Cut, ProgramKind, TapName
from camserve.server.errors import NotFound, Reason, Unsupported

__all__ = ["ExportProgram", "load_export"]

# Calls of one module whose graphs differ are unflattened into modules of their own: `relu`, `relu@1`, `relu@2`.
_CALL_SUFFIX = re.compile(r"@\d+")


class ExportProgram(HookedProgram):
    """A `Program` over an exported one.

    What tracing left out is not there: a layer that did nothing (Identity) is never called, an output of a layer that nothing
    used is gone, and dictionary keys of a layer's outputs are numbers (the model's own output keeps its keys). Sizes that were
    not exported as dynamic are refused by the archive itself with a RuntimeError; the probe finds out which batch sizes work.

    Args:
        exported: as loaded; it is not used again by anyone else.
        device: where it runs; the graph's own constants and devices are moved too.
        dtype: parameters and buffers are cast to it. Casts that are written in the graph keep their dtype, so that an archive
            exported in float32 may refuse to run in another.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        moved = move_to_device_pass(exported, torch.device(device))
        module = torch.export.unflatten(moved)
        self._unflattened = module
        super().__init__(
            kind=ProgramKind.EXPORT,
            module=module,
            paths=[(_CALL_SUFFIX.sub("", path), child) for path, child in module.named_modules() if path],
            aliases={},
            code=str(exported.graph),
            device=torch.device(device),
            dtype=dtype,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by the names they had in the eager model."""
        return {_CALL_SUFFIX.sub("", name): tensor for name, tensor in super().tensors().items()}

    def rewritten(self, _inputs: Sequence[torch.Tensor], *, channels_last: bool) -> ExportProgram | None:
        """This program, to be given its inputs channels last, if asked: its operators then lay out what they make likewise.

        Batch normalisations stay: in an exported graph they are operators beside convolutions, not layers that can be folded.

        Returns:
            None if there is nothing to rewrite.
        """
        return self if channels_last else None

    def biases(self) -> dict[TapName, torch.Tensor]:
        """What each affine operator adds, by the module call that returns its result. Raises as `Program.biases`."""
        if self._flat is None:
            raise incomplete(
                self._kind, "its call signatures", "were preserved when it was exported, which hides its operators"
            )
        return biases_of_graph(self._unflattened, self._flat)

    def _cut_at(self, place: TapName) -> Cut:
        """Two graphs where that can be done."""
        if self._flat is None:
            return self._cut_by_rerun(place)
        return ExportCut(self._unflattened, self._flat, place, functools.partial(self._cut_by_rerun, place))

    @functools.cached_property
    def _flat(self) -> Flat | None:
        return flatten(self._unflattened)

    def _under(self, rule: BackwardRule, rows: int) -> contextlib.AbstractContextManager[Sequence[torch.Tensor]]:
        if rule in GATES:
            return gated_nodes(self._module, rule)
        if rule is BackwardRule.ATTENTION:
            return watched_nodes(self._module, rows)
        return contextlib.nullcontext(())


def load_export(
    source: Path | BinaryIO, *, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> ExportProgram:
    """Loads a `.pt2` archive.

    Raises:
        NotFound: there is no such file.
        Unsupported: it is not an archive of `torch.export.save`, it is of a version that this PyTorch cannot read, or it holds
            code that reading it would run.
    """
    if isinstance(source, Path) and not source.is_file():
        raise NotFound(Reason.MODEL_NOT_FOUND, f"there is no file {source}", metadata={"file": source})
    try:
        _register_operators(check_archive(source))
        exported = torch.export.load(source)
    except (RuntimeError, ValueError, KeyError, TypeError, AssertionError, OSError, zipfile.BadZipFile) as error:
        raise Unsupported(
            Reason.MODEL_FAILED,
            f"cannot read {source} as a torch.export archive: {message_of(error)}; write it with torch.export.save ('.pt2')",
            metadata={"file": source},
        ) from error
    return ExportProgram(exported, device=device, dtype=dtype)


def _register_operators(graphs: Iterable[bytes]) -> None:
    """Imports torchvision if the archive calls its operators: not always, since that takes seconds and few archives need it."""
    if any(b"torch.ops.torchvision." in graph for graph in graphs):
        importlib.import_module("torchvision")

"""How much memory a program's parameters and buffers take, in every form of it that is held. `models/loader.py` asks at load."""

from __future__ import annotations

from torch import Tensor

from camserve.server.engine.planned import PlannedProgram
from camserve.server.engine.program import Program

__all__ = ["held_bytes"]


def held_bytes(program: Program) -> int:
    """Bytes of all tensors of a program; those that several forms share count once."""
    forms: list[Program] = [program]
    extra: list[Tensor] = []
    if isinstance(program, PlannedProgram):
        forms = [program.original, program.rewritten]
        extra = list(program.fused_tensors())
    return sum(
        dict(_storage(tensor) for tensor in (*extra, *(t for form in forms for t in form.tensors().values()))).values()
    )


def _storage(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor's memory from that of others, and its bytes."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        # A tensor in oneDNN's own layout has no storage that could be seen; nothing shares it, and its values are what it takes.
        return id(tensor), tensor.numel() * tensor.element_size()
    return storage.data_ptr(), storage.nbytes()

"""SHA-256 digests of a program, the same for the same weights whatever file they came from.

Arrives: tensors by name and the program's code as text. Leaves: `Digests` for the model card and the audit record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from camserve.server.engine.program import Digests

__all__ = ["digest_tensors"]


def digest_tensors(tensors: Mapping[str, Tensor], code: str) -> Digests:
    """Digests every tensor's name, dtype, shape and bytes in order of name, and the code."""
    weights = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        weights.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        weights.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return Digests(weights=weights.hexdigest(), code=hashlib.sha256(code.encode()).hexdigest())

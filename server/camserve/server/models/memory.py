"""Gives the memory of models that are gone back to the machine. Called by `lifecycle.py` in a thread beside those that serve."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import torch

__all__ = ["give_back"]


def give_back(is_gone: Callable[[], bool]) -> None:
    """Collects what refers to itself in a circle, if need be, and hands free memory back to the machine.

    Graphs of exported programs are such circles. Collecting stops everybody for some tens of milliseconds: hence only where
    a model is not gone without it. What a server held when it began to serve was put out of the collector's sight (`cli.py`), and
    takes some tenths of a second to look through; so that comes last.

    Args:
        is_gone: whether the model is.
    """
    if not is_gone():
        gc.collect()
    if not is_gone() and gc.get_freeze_count():
        gc.unfreeze()
        gc.collect()
        gc.freeze()
    torch.cuda.empty_cache()
    # The allocator keeps what is free for models of that size, and the next one may have another. Only glibc needs to be told.
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)

"""What a row's failure is to its caller, in one place for the device thread and for explanations without a server.

`runner.py` and `local/` call it with whatever a model raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from camserve.server.engine.look import message_of
from camserve.server.errors import CamserveError, ExecutionFailed, Reason

__all__ = ["contained", "not_finite", "row_failure"]

_T = TypeVar("_T")


def row_failure(error: BaseException, model: str) -> CamserveError:
    """What is told of an error that stopped the pass of one row; memory that ran out is given back to the device.

    Args:
        error: what the pass raised; a `CamserveError` stays as it is.
        model: name of the model.
    """
    if isinstance(error, CamserveError):
        return error
    # The CPU's allocator raises a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        torch.cuda.empty_cache()
        return ExecutionFailed(
            Reason.OUT_OF_MEMORY,
            f"the device ran out of memory for one row of model {model!r}; use a smaller input or a deeper layer",
            metadata={"model": model},
        )
    return ExecutionFailed(
        Reason.MODEL_FAILED,
        f"model {model!r} failed on this input: {type(error).__name__}: {message_of(error)}",
        metadata={"model": model},
    )


def not_finite(model: str) -> CamserveError:
    """What is told of a row whose scores are NaN or infinite."""
    return ExecutionFailed(
        Reason.MODEL_FAILED,
        f"model {model!r} gave scores that are not finite for this input; nothing can be explained",
        metadata={"model": model},
    )


def contained(work: Callable[[], _T]) -> _T:
    """Runs foreign code; what would end the process or cannot travel in a Future becomes an ordinary error."""
    try:
        return work()
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error

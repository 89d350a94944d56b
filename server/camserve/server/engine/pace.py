"""How a model's passes are paced: threads of a kernel, and how much amplified work is done before others get their turn.

Chosen once at load by `models/warm_up.py`; passes and amplified work read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import torch

__all__ = ["ALL_THREADS", "MOST_TAIL_ROWS", "Pace", "use_threads"]

ALL_THREADS: Final = torch.get_num_threads()
"""What torch takes if nobody says: asked while nobody has, for a thread begun later starts with what another one set last."""

MOST_TAIL_ROWS: Final = 256
"""Activations that are tried at once at most, however short the rest of the program is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Sizes that follow from what passes took at warm-up, not from the clock of a request: maps come out the same again.

    Attributes:
        threads: of a kernel on a CPU; 0 leaves them as they are. Small models lose more to waiting than they gain.
        chunk_rows: most inputs that an amplified method tries before others get their turn; None for as many as a pass has.
        tail_rows: most activations that one tries at a layer, by its name as specs write it; where it is missing, memory decides.
    """

    threads: int = 0
    chunk_rows: int | None = None
    tail_rows: Mapping[str, int] = dataclasses.field(default_factory=dict)


def use_threads(count: int) -> None:
    """Sets the number for what this thread runs from now on; 0 leaves it as it is. Cheap where nothing changes."""
    if count and torch.get_num_threads() != count:
        torch.set_num_threads(count)

from __future__ import annotations

import torch

from camserve.server.engine.high_water import HighWater

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20


def test_what_is_held_for_a_while_is_measured() -> None:
    """A tensor that is gone at the end counts in full; work without one counts next to nothing."""
    with HighWater(CPU) as much:
        torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    with HighWater(CPU) as little:
        torch.ones(1)

    assert much.gained_bytes is not None
    assert little.gained_bytes is not None
    assert 60 * MEBIBYTE <= much.gained_bytes
    assert little.gained_bytes < 32 * MEBIBYTE

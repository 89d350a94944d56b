"""Draws a map in colours over its source picture; `encode.py` turns the result into a file.

The colour and the weight of a pixel both follow its value: with t = 0 for the map's smallest value and 1 for its largest, the
pixel becomes `(1 - opacity * t) * source + opacity * t * colour(t)`. Where there is no evidence the picture shows through
untouched, and so do pixels that the model did not see.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from camserve.server.jobs import ByteArray

__all__ = ["blend", "colours"]

# Ten evenly spaced colours of matplotlib's "inferno" (CC0): lightness rises steadily, so that order survives gray prints and
# colour-blind eyes. Between them colours are linear.
_ANCHORS = np.array(
    [
        (0, 0, 4),
        (27, 12, 66),
        (75, 12, 107),
        (120, 28, 109),
        (165, 44, 96),
        (207, 68, 70),
        (237, 105, 37),
        (251, 154, 6),
        (247, 208, 60),
        (252, 255, 164),
    ],
    dtype=np.float64,
)


@lru_cache(maxsize=1)
def colours() -> ByteArray:
    """The colour of each code: (256 3) uint8."""
    places = np.linspace(0, len(_ANCHORS) - 1, 256)
    channels = [np.interp(places, np.arange(len(_ANCHORS)), _ANCHORS[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def blend(source: ByteArray, codes: ByteArray, opacity: float) -> ByteArray:
    """Lays colours over a picture.

    Args:
        source: (h w 3) RGB.
        codes: (h w), 0 for the map's smallest value, 255 for its largest.
        opacity: 0 to 1, the weight of the colours where the map is largest.

    Returns:
        (h w 3) RGB.
    """
    kept, added = _tables(opacity)
    # 16-bit fixed point: 256 * 255 fits, and results do not depend on the machine.
    mixed: npt.NDArray[np.uint16] = source * kept[codes][..., None]
    mixed += added[codes]
    return (mixed >> 8).astype(np.uint8)


@lru_cache(maxsize=32)
def _tables(opacity: float) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Per code: the source's weight in 256ths, (256), and the colour times its weight with rounding, (256 3)."""
    weights = np.rint(np.arange(256) / 255 * opacity * 256).astype(np.uint16)
    return 256 - weights, weights[:, None] * colours() + np.uint16(128)

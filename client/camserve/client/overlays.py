"""A map becomes colours, and colours lie over a picture.

`heatmaps.py` calls `blend` for `Heatmap.overlay()`, the report calls `colourise` for a legend. Only numpy and Pillow are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from camserve.client.boxes import Box

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

# Evenly spaced colours, joined linearly. Turbo is the usual dress of class activation maps; viridis and inferno grow evenly in
# lightness, so that they also read in gray and to the colour-blind.
COLORMAPS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "turbo": (
            "30123b", "4454c3", "448ffe", "1fc9dd", "2aefa1", "7dff56", "c1f334", "f1cb3a", "fe932a", "ea4e0d", "be2102",
            "7a0403",
        ),
        "viridis": (
            "440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725",
        ),
        "inferno": (
            "000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "f7d13d", "fcffa4",
        ),
        "gray": ("000000", "ffffff"),
    },
)  # fmt: skip


def unit_range(values: FloatArray) -> FloatArray:
    """Returns a map (h, w) scaled so that its smallest value is 0 and its largest 1; a constant map becomes 0 everywhere."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros_like(values)
    return np.asarray((values - low) / (high - low), np.float32)


def colourise(intensities: FloatArray, colormap: str = "turbo") -> ByteArray:
    """Returns the colours of intensities.

    Args:
        intensities: 0 to 1, any shape (...).
        colormap: a key of COLORMAPS.

    Returns:
        uint8 (..., 3), red green blue.

    Raises:
        ValueError: when there is no such colormap.
    """
    if colormap not in COLORMAPS:
        raise ValueError(f"no colormap {colormap!r}; there are {', '.join(COLORMAPS)}")
    anchors = np.array([tuple(bytes.fromhex(colour)) for colour in COLORMAPS[colormap]], np.float64)
    stops = np.linspace(0, 1, len(anchors))
    levels = np.linspace(0, 1, 256)
    table = np.stack([np.interp(levels, stops, anchors[:, channel]) for channel in range(3)], axis=-1)
    codes = np.rint(np.clip(intensities, 0, 1) * 255).astype(np.uint8)
    return np.asarray(np.rint(table).astype(np.uint8)[codes])


def signed(values: FloatArray) -> Image.Image:
    """Returns a signed map as an RGB picture of its own size, in which 0 is mid-gray and the largest magnitude full colour.

    Args:
        values: (h, w, 3), shown as red, green and blue; or (h, w, 1) or (h, w), shown red where positive, blue where negative.
            Of any other number of channels the mean is shown.
    """
    channels = values[..., None] if values.ndim == 2 else values
    if channels.shape[-1] not in {1, 3}:
        channels = channels.mean(axis=-1, keepdims=True)
    largest = float(np.abs(channels).max()) or 1.0
    shares = channels / largest
    if shares.shape[-1] == 1:
        # From gray, evidence for takes away green and blue, evidence against red and green.
        shares = np.concatenate([shares, -np.abs(shares), -shares], axis=-1)
    return Image.fromarray(np.rint(127.5 + 127.5 * shares).astype(np.uint8))


def outlined(picture: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """Returns a picture with the outlines of boxes drawn on it, in white between black, to be seen on any ground."""
    drawn = picture.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    width = max(1, round(max(drawn.size) / 300))
    for box in boxes:
        right, bottom = box.left + box.width - 1, box.top + box.height - 1
        pen.rectangle((box.left, box.top, right, bottom), outline="black", width=3 * width)
        inner = (box.left + width, box.top + width, right - width, bottom - width)
        if inner[2] >= inner[0] and inner[3] >= inner[1]:
            pen.rectangle(inner, outline="white", width=width)
    return drawn


def blend(picture: Image.Image, values: FloatArray, *, opacity: float, colormap: str) -> Image.Image:
    """Returns a picture with a map's colours over it.

    Colour and weight of a pixel both follow its value, as in the server's overlays: where there is no evidence the picture shows
    through untouched.

    Args:
        picture: any mode, of the map's width and height.
        values: (height, width); scaled to its own range.
        opacity: weight of the colours where the map is largest, 0 to 1.
        colormap: a key of COLORMAPS.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: when the opacity is out of range or there is no such colormap.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}; it must lie between 0 and 1")
    intensities = unit_range(values)
    colours = Image.fromarray(colourise(intensities, colormap))
    weights = Image.fromarray(np.rint(intensities * (opacity * 255)).astype(np.uint8))
    return Image.composite(colours, picture.convert("RGB"), weights)

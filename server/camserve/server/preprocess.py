"""Turns upright pixels into a model's input as its recipe says, and tells where they lie on the source.

`decode.py` calls `place` first, to learn how small the picture will get, then `sample` on the decoded pixels. Resizing is
Pillow's, bit for bit what torchvision's transforms do with a PIL image.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from camserve.server.bands import bands
from camserve.server.image_file import Box
from camserve.server.jobs import ByteArray, Geometry
from camserve.server.models.recipe import InputRecipe

__all__ = ["Placement", "place", "sample"]

_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Before a crop, a sliver of 1 x 60000 pixels would be resized to gigabytes; above this only the part kept is made. The same up
# to rounding, but not always to the last bit: Pillow takes boxes in float32, and which axis comes first depends on the sizes.
_LARGEST_RESIZED_PIXELS: Final = 4_000_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the model's input lies on the resized source.

    Attributes:
        width: of the source, resized.
        height: likewise.
        left: column of the resized source that is the input's first; negative when padding comes first.
        top: likewise for rows.
    """

    width: int
    height: int
    left: int
    top: int


def place(recipe: InputRecipe, width: int, height: int) -> Placement:
    """Places a source of `width` x `height` pixels as the recipe says."""
    _, input_height, input_width = recipe.shape
    if recipe.resize == "stretch":
        return Placement(width=input_width, height=input_height, left=0, top=0)
    if recipe.resize == "letterbox":
        scale = min(input_width / width, input_height / height)
        resized_width = min(input_width, max(1, round(width * scale)))
        resized_height = min(input_height, max(1, round(height * scale)))
    elif recipe.resize_size is None:
        scale = max(input_width / width, input_height / height)
        resized_width = max(input_width, round(width * scale))
        resized_height = max(input_height, round(height * scale))
    elif width <= height:
        resized_width, resized_height = recipe.resize_size, int(recipe.resize_size * height / width)
    else:
        resized_width, resized_height = int(recipe.resize_size * width / height), recipe.resize_size
    return Placement(
        width=resized_width,
        height=resized_height,
        left=_first(resized_width, input_width),
        top=_first(resized_height, input_height),
    )


def _first(resized: int, kept: int) -> int:
    """Where a centred window of `kept` pixels begins; rounds as torchvision's center_crop does, which pads when too large."""
    return round((resized - kept) / 2) if resized >= kept else -((kept - resized) // 2)


def geometry(placement: Placement, recipe: InputRecipe, width: int, height: int) -> Geometry:
    """How the placed input lies on a source of `width` x `height` pixels."""
    scale_x, scale_y = width / placement.width, height / placement.height
    return Geometry(
        source_width=width,
        source_height=height,
        input_width=recipe.shape[2],
        input_height=recipe.shape[1],
        scale_x=scale_x,
        scale_y=scale_y,
        offset_x=(placement.left + 0.5) * scale_x - 0.5,
        offset_y=(placement.top + 0.5) * scale_y - 0.5,
    )


def sample(image: Image.Image, box: Box, placement: Placement, recipe: InputRecipe) -> npt.NDArray[np.generic]:
    """Resizes, crops or pads, normalises.

    Args:
        image: upright, mode RGB, or L for recipes of one channel and for gray pictures.
        box: the part of it that is the whole source.
        placement: from `place`.
        recipe: the model's.

    Returns:
        (c h w) in the recipe's dtype, C-contiguous.
    """
    channels, height, width = recipe.shape
    columns = (max(placement.left, 0), min(placement.left + width, placement.width))
    rows = (max(placement.top, 0), min(placement.top + height, placement.height))
    shown = _resized(image, box, placement, columns, rows, _FILTERS[recipe.interpolation])
    tables = _tables(recipe.scale, recipe.mean, recipe.std, channels, recipe.dtype)
    colours = shown.getbands()[::-1] if recipe.channels == "bgr" else shown.getbands()
    result = np.empty(recipe.shape, recipe.dtype)
    # Picked out of Pillow's pixels by name: one copy, and each colour's bytes side by side.
    for colour in dict.fromkeys(colours):
        plane: ByteArray = np.frombuffer(shown.tobytes("raw", colour), np.uint8).reshape(shown.height, shown.width)
        if plane.shape != (height, width):
            framed = np.full((height, width), recipe.pad_value, np.uint8)
            top, left = rows[0] - placement.top, columns[0] - placement.left
            framed[top : top + shown.height, left : left + shown.width] = plane
            plane = framed
        for band in bands(height, width):
            codes = plane[band].astype(np.intp)
            for channel in range(channels):
                if colours[channel % len(colours)] == colour:
                    np.take(tables[channel], codes, out=result[channel, band], mode="wrap")
    return result


def _resized(
    image: Image.Image,
    box: Box,
    placement: Placement,
    columns: tuple[int, int],
    rows: tuple[int, int],
    resampling: Image.Resampling,
) -> Image.Image:
    """The wanted columns and rows of the resized source."""
    size = (placement.width, placement.height)
    if size[0] * size[1] <= _LARGEST_RESIZED_PIXELS:
        is_resized = (*size, *box) == (*image.size, 0, 0, *image.size)
        resized = image if is_resized else image.resize(size, resampling, box=box)
        kept = (columns[0], rows[0], columns[1], rows[1])
        return resized if kept == (0, 0, *size) else resized.crop(kept)
    x_scale, y_scale = (box[2] - box[0]) / placement.width, (box[3] - box[1]) / placement.height
    part = (
        box[0] + columns[0] * x_scale,
        box[1] + rows[0] * y_scale,
        min(box[0] + columns[1] * x_scale, image.width),
        min(box[1] + rows[1] * y_scale, image.height),
    )
    return image.resize((columns[1] - columns[0], rows[1] - rows[0]), resampling, box=part)


@lru_cache(maxsize=64)
def _tables(
    scale: float, mean: tuple[float, ...], std: tuple[float, ...], channels: int, dtype: str
) -> npt.NDArray[np.generic]:
    """(c 256): what each value of a pixel becomes in each channel, worked out in float64."""
    codes = np.arange(256, dtype=np.float64) * scale
    means, deviations = (np.broadcast_to(np.asarray(values), channels)[:, None] for values in (mean, std))
    tables: npt.NDArray[np.generic] = ((codes - means) / deviations).astype(dtype)
    return tables

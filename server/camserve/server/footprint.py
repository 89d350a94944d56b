"""Estimates, before anything is decoded, the most memory one request will take in the decode and encode stages.

`pipeline.py` tells it to the door. The numbers are upper estimates in bytes for each pixel, of the growth of the resident set
over pictures of 49 megapixels in every format, with and without alpha, 16 bits, EXIF orientation and a kept source. Pillow
holds a colour pixel in 4 bytes; converting or turning a picture needs a second one.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from camserve.server.decode import may_reduce
from camserve.server.image_header import Header, HeaderError, ImageFormat, read_header
from camserve.server.jobs import EncodedImage, JobInput, RawFrame, TensorInput
from camserve.server.models.recipe import InputRecipe

__all__ = ["held_bytes"]

# Decoding in full, the kept source included. JPEG measured 6.9 (8 when turned), PNG and BMP 8 to 9. libtiff adds a strip or
# tile of up to 8 bytes a pixel; WebP two canvases and a copy.
_DECODE: Final = {
    ImageFormat.JPEG: 8,
    ImageFormat.PNG: 10,
    ImageFormat.BMP: 10,
    ImageFormat.TIFF: 18,
    ImageFormat.WEBP: 20,
}
# A JPEG that is not written in one pass keeps 2 bytes of coefficients for each of up to 4 components: measured 12 together.
_COEFFICIENTS: Final = 8
_FRAME: Final = 10
_SOURCE: Final = 3
# Drawing and encoding one map at source size: measured 8 for float32, 5 for uint8, and an overlay's picture and file.
_MAP: Final = 9
# What was sent of one map while the next is being made: float32 that does not deflate.
_SENT: Final = 4
# Requests have costs of their own, pictures of few pixels rows of many bytes.
_LEAST: Final = 1 << 18


def held_bytes(payload: JobInput, recipe: InputRecipe, *, pixels: int, keep_source: bool, source_size_maps: int) -> int:
    """The most bytes that a request holds at once, its payload included.

    Args:
        payload: as it arrived, already measured.
        recipe: the model's.
        pixels: from `decode.measure`.
        keep_source: whether decode will keep the source's pixels.
        source_size_maps: how many heatmaps are drawn at source size, overlays included; they are made one after another.
    """
    row = _row_elements(payload, recipe, pixels) * np.dtype(recipe.dtype).itemsize
    drawing = (
        (_SOURCE if keep_source else 0) + (_MAP if source_size_maps else 0) + (_SENT if source_size_maps > 1 else 0)
    )
    per_pixel = max(_decoding(payload, recipe, keep_source=keep_source), drawing)
    # The row is made in its own type from bytes, and checked in it.
    return len(payload.data) + math.ceil(per_pixel * pixels) + 3 * row + _LEAST


def _row_elements(payload: JobInput, recipe: InputRecipe, pixels: int) -> int:
    """Of the row that will be made, which is as large as what came where the model takes any size."""
    if recipe.is_variable and isinstance(payload, TensorInput):
        return math.prod(payload.shape)
    return recipe.shape[0] * pixels if recipe.resize == "none" else math.prod(recipe.shape)


def _decoding(payload: JobInput, recipe: InputRecipe, *, keep_source: bool) -> float:
    if isinstance(payload, RawFrame):
        return _FRAME
    if not isinstance(payload, EncodedImage):
        return 0
    try:
        header = read_header(payload.data)
    except HeaderError:
        return 0  # Decode refuses it.
    return _file(header, recipe, keep_source=keep_source)


def _file(header: Header, recipe: InputRecipe, *, keep_source: bool) -> float:
    pictures: float = _DECODE[header.format]
    if not keep_source and may_reduce(header, recipe):
        pictures /= 4  # Half the width and height, or less.
    # The coefficients are gone before a picture is converted or turned.
    return max(pictures, pictures / 2 + _COEFFICIENTS) if header.is_buffered else pictures

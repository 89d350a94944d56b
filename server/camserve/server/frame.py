"""Reads raw camera frames: strided bytes in, (h w) gray or (h w 3) RGB uint8 out, for `decode.py`.

Bayer mosaics are interpolated bilinearly: plain, fast, and without the sharpening that would invent texture in a heatmap.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from camserve.server.bands import bands
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.jobs import ByteArray, PixelFormat, RawFrame

__all__ = ["check_frame", "read_frame"]

_PIXEL_BYTES: Final = {PixelFormat.MONO16: 2, PixelFormat.RGB8: 3, PixelFormat.BGR8: 3}
# (row, column) of red in the first 2 x 2 cells; blue lies diagonally opposite.
_RED: Final = {
    PixelFormat.BAYER_RGGB8: (0, 0),
    PixelFormat.BAYER_BGGR8: (1, 1),
    PixelFormat.BAYER_GRBG8: (0, 1),
    PixelFormat.BAYER_GBRG8: (1, 0),
}


def check_frame(frame: RawFrame) -> None:
    """Checks a frame's sizes against its bytes, without touching pixels.

    Raises:
        InvalidRequest: TENSOR_MISMATCH, naming the sizes and the bytes they need.
    """
    name, width, height = frame.pixel_format.value, frame.width, frame.height
    smallest = 2 if frame.pixel_format in _RED else 1
    if width < smallest or height < smallest:
        raise _mismatch(frame, f"a {name} frame needs at least {smallest} x {smallest} pixels, not {width} x {height}")
    row_bytes = width * _PIXEL_BYTES.get(frame.pixel_format, 1)
    if frame.stride < row_bytes:
        raise _mismatch(
            frame,
            f"stride of {frame.stride} bytes is shorter than a row: {width} {name} pixels take {row_bytes}; "
            "leave the stride out when rows follow without gap",
        )
    needed = frame.stride * (height - 1) + row_bytes
    if len(frame.data) < needed:
        raise _mismatch(
            frame,
            f"frame of {width} x {height} {name} pixels with a stride of {frame.stride} bytes needs {needed} bytes, "
            f"but {len(frame.data)} arrived",
        )


def read_frame(frame: RawFrame) -> ByteArray:
    """Gives a checked frame's pixels: (h w) for mono formats, (h w 3) RGB for the others; C-contiguous.

    Raises:
        InvalidRequest: as `check_frame`.
    """
    check_frame(frame)
    pixel_bytes = _PIXEL_BYTES.get(frame.pixel_format, 1)
    rows: ByteArray = np.ndarray(
        (frame.height, frame.width * pixel_bytes), np.uint8, buffer=frame.data, strides=(frame.stride, 1)
    )
    if frame.pixel_format in _RED:
        return _demosaic(rows, _RED[frame.pixel_format])
    if frame.pixel_format is PixelFormat.MONO16:
        gray = np.empty((frame.height, frame.width), np.uint8)
        for band in bands(*gray.shape):
            values = np.ascontiguousarray(rows[band]).view("<u2").astype(np.uint32)
            gray[band] = (values * 255 + 32_767) // 65_535
        return gray
    if pixel_bytes == 3:
        pixels = rows.reshape(frame.height, frame.width, 3)
        return np.ascontiguousarray(pixels[..., ::-1] if frame.pixel_format is PixelFormat.BGR8 else pixels)
    return np.ascontiguousarray(rows)


def _demosaic(mosaic: ByteArray, red: tuple[int, int]) -> ByteArray:
    """Interpolates (h w) mosaic values to (h w 3): the mean of the nearest cells of each colour."""
    height, width = mosaic.shape
    # Reflection without repeating the edge keeps the pattern's parity.
    padded = np.pad(mosaic, 1, mode="reflect")
    row_parity = (np.arange(height + 2) - 1) % 2
    column_parity = (np.arange(width + 2) - 1) % 2
    red_rows, red_columns = row_parity == red[0], column_parity == red[1]
    pixels = np.empty((height, width, 3), np.uint8)
    for band in bands(height, width):
        around = slice(band.start, band.stop + 2)
        part, is_red = padded[around].astype(np.uint16), red_rows[around]
        pixels[band, :, 0] = _spread(part * np.outer(is_red, red_columns), is_green=False)
        pixels[band, :, 1] = _spread(part * (is_red[:, None] ^ red_columns), is_green=True)
        pixels[band, :, 2] = _spread(part * np.outer(~is_red, ~red_columns), is_green=False)
    return pixels


def _spread(plane: npt.NDArray[np.uint16], *, is_green: bool) -> ByteArray:
    """Fills a colour's gaps; (h+2 w+2) with zeros in the gaps to (h w), rounded to the nearest."""
    if is_green:
        cross = plane[:-2, 1:-1] + plane[2:, 1:-1] + plane[1:-1, :-2] + plane[1:-1, 2:]
        return ((cross + 4 * plane[1:-1, 1:-1] + 2) >> 2).astype(np.uint8)
    across = plane[:, :-2] + 2 * plane[:, 1:-1] + plane[:, 2:]
    block: npt.NDArray[np.uint16] = across[:-2] + 2 * across[1:-1] + across[2:]
    return ((block + 2) >> 2).astype(np.uint8)


def _mismatch(frame: RawFrame, message: str) -> InvalidRequest:
    return InvalidRequest(
        Reason.TENSOR_MISMATCH,
        message,
        metadata={
            "pixelFormat": frame.pixel_format.value,
            "width": frame.width,
            "height": frame.height,
            "stride": frame.stride,
            "bytes": len(frame.data),
        },
    )

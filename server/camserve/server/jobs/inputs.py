"""What a request carries to be looked at, and what becomes of it: files, frames and tensors, then samples and their geometry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from camserve.server.jobs.words import PixelFormat

__all__ = [
    "BoolArray",
    "Box",
    "ByteArray",
    "EncodedImage",
    "FloatArray",
    "Geometry",
    "JobInput",
    "RawFrame",
    "Sample",
    "TensorInput",
]

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A JPEG, PNG, WebP, BMP or TIFF file as it arrived."""

    FIELD: ClassVar[str] = "image"
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RawFrame:
    """Uncompressed pixels, rows from top to bottom.

    Attributes:
        pixel_format: how the bytes are to be read; 16-bit values are little-endian.
        width: pixels a row.
        height: rows.
        stride: bytes from one row to the next; at least a row's own bytes.
        data: `stride * (height - 1)` bytes plus one row at least.
    """

    FIELD: ClassVar[str] = "frame"
    pixel_format: PixelFormat
    width: int
    height: int
    stride: int
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """Exactly the model's input for one row; no preprocessing.

    Attributes:
        dtype: numpy name: float32, float16, uint8 …
        shape: without the batch dimension.
        data: little-endian, C order.
    """

    FIELD: ClassVar[str] = "tensor"
    dtype: str
    shape: tuple[int, ...]
    data: bytes


JobInput: TypeAlias = EncodedImage | RawFrame | TensorInput


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the source image in pixels; the far edges are outside it."""

    left: float
    top: float
    width: float
    height: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How model input pixels lie on the source image, both counted in pixel centres from (0, 0).

    `x_source = scale_x * x_input + offset_x`, likewise for y. EXIF orientation has been applied to the source first, so the two
    are never rotated against each other.

    Attributes:
        source_width: pixels of the source after EXIF orientation.
        source_height: likewise.
        input_width: pixels of the model's input.
        input_height: likewise.
        scale_x: source pixels for one input pixel.
        scale_y: likewise.
        offset_x: source x of the input's first column.
        offset_y: source y of the input's first row.
    """

    source_width: int
    source_height: int
    input_width: int
    input_height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A decoded input, ready to be stacked into a batch.

    Attributes:
        tensor: (c h w) or the model's own rank, float32 (or the dtype the card asks for), C-contiguous.
        geometry: how it lies on the source; None for tensors that are not images.
        extras: further inputs by name, for models that take several.
        source: (h w 3) uint8, kept only when a spec wants an overlay.
        decode_seconds: time in the decoder.
    """

    tensor: npt.NDArray[np.generic]
    geometry: Geometry | None
    extras: Mapping[str, npt.NDArray[np.generic]] = dataclasses.field(default_factory=dict)
    source: ByteArray | None = None
    decode_seconds: float = 0.0

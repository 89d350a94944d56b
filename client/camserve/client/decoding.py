"""A heatmap's payload becomes an array again, as the comment on `camserve.v1.Heatmap` lays down.

`heatmaps.py` calls this when a map's values or its overlay are first looked at. Bytes that do not match their digest, size or
form are refused as `CorruptPayload`, never guessed at.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from camserve.client import words
from camserve.client.errors import CorruptPayload
from camserve.v1 import heatmap_pb2, spec_pb2

FloatArray: TypeAlias = npt.NDArray[np.float32]

OVERLAYS: Final = frozenset(
    {spec_pb2.ENCODING_OVERLAY_PNG, spec_pb2.ENCODING_OVERLAY_JPEG, spec_pb2.ENCODING_OVERLAY_WEBP},
)
_CELL_TYPES: Final[Mapping[int, np.dtype[Any]]] = {
    spec_pb2.ENCODING_FLOAT32: np.dtype("<f4"),
    spec_pb2.ENCODING_FLOAT16: np.dtype("<f2"),
    spec_pb2.ENCODING_UINT8: np.dtype("u1"),
}
_LARGEST_CODES: Final[Mapping[int, int]] = {
    spec_pb2.ENCODING_UINT8: 255,
    spec_pb2.ENCODING_PNG8: 255,
    spec_pb2.ENCODING_PNG16: 65535,
}
# An image file has no size known beforehand; more than this is not a heatmap.
_FILE_LIMIT_BYTES: Final = 256 * 1024 * 1024


def payload_bytes(message: heatmap_pb2.Heatmap) -> bytes:
    """Returns the payload before compression, checked against its digest.

    Raises:
        CorruptPayload: when it cannot be inflated, is longer than its shape allows, or has another digest.
    """
    payload = message.payload
    if message.compression == heatmap_pb2.COMPRESSION_ZLIB:
        payload = _inflate(payload, _expected_bytes(message) or _FILE_LIMIT_BYTES)
    elif message.compression not in {heatmap_pb2.COMPRESSION_UNSPECIFIED, heatmap_pb2.COMPRESSION_NONE}:
        raise _corrupt(f"compression {message.compression} is newer than this client")
    if hashlib.sha256(payload).digest() != message.payload_sha256:
        raise _corrupt("the payload does not match payload_sha256; it was changed on the way")
    return payload


def decode_map(message: heatmap_pb2.Heatmap) -> FloatArray:
    """Returns a map's values.

    Returns:
        float32 (h, w), in the units of the target's score unless the map was normalised.

    Raises:
        CorruptPayload: when the bytes are not what the message says.
        ValueError: when the message holds an overlay, which has colours but no values.
    """
    if message.encoding in OVERLAYS:
        raise ValueError(
            f"{words.ENCODINGS.word(message.encoding)} holds a picture and no values; ask for 'uint8' or 'float32'"
        )
    payload = payload_bytes(message)
    shape = tuple(message.shape)
    cells: npt.NDArray[Any]
    if message.encoding in _CELL_TYPES:
        if len(payload) != _expected_bytes(message):
            raise _corrupt(
                f"{len(payload)} bytes do not fill shape {shape} of {words.ENCODINGS.word(message.encoding)}"
            )
        cells = np.frombuffer(payload, _CELL_TYPES[message.encoding]).reshape(shape)
    elif message.encoding in _LARGEST_CODES:
        cells = np.asarray(_open(payload))
        if cells.shape != shape:
            raise _corrupt(f"the file holds {cells.shape} cells, the message says {shape}")
    else:
        raise _corrupt(f"encoding {message.encoding} is newer than this client")
    largest = _LARGEST_CODES.get(message.encoding)
    if largest is None:
        return np.asarray(cells, np.float32)
    span = message.value_max - message.value_min
    return np.asarray(message.value_min + cells / largest * span, np.float32)


def decode_overlay(message: heatmap_pb2.Heatmap) -> Image.Image:
    """Returns the picture of an OVERLAY encoding; raises CorruptPayload when it is none."""
    return _open(payload_bytes(message))


def _expected_bytes(message: heatmap_pb2.Heatmap) -> int | None:
    """Returns how long the payload of a cell encoding must be; None for files."""
    cell = _CELL_TYPES.get(message.encoding)
    return None if cell is None else int(np.prod(message.shape, dtype=np.int64)) * cell.itemsize


def _inflate(payload: bytes, limit: int) -> bytes:
    """Inflates at most `limit` bytes, so that a few bytes cannot grow into gigabytes."""
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(payload, limit + 1)
    except zlib.error as error:
        raise _corrupt(f"the payload cannot be inflated: {error}") from error
    if len(inflated) > limit or not inflater.eof:
        raise _corrupt(f"the payload inflates to something other than the {limit} bytes at most that it should have")
    return inflated


def _open(payload: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(payload))
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways of saying that a file is broken.
        raise _corrupt(f"the payload is no readable image file: {error}") from error
    return picture


def _corrupt(message: str) -> CorruptPayload:
    return CorruptPayload("DATA_LOSS", "PAYLOAD_CORRUPT", message)

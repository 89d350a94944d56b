from __future__ import annotations

import hashlib
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from camserve.client import CorruptPayload
from camserve.client.decoding import decode_map, decode_overlay
from camserve.v1 import heatmap_pb2


def _message(encoding: str, payload: bytes, shape: tuple[int, ...] = (1, 3), **fields: object) -> heatmap_pb2.Heatmap:
    digest = hashlib.sha256(payload).digest()
    return heatmap_pb2.Heatmap(
        **{"encoding": encoding, "payload": payload, "shape": shape, "payload_sha256": digest, **fields}  # type: ignore[arg-type]
    )


def _png(
    array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | np.ndarray[tuple[int, ...], np.dtype[np.uint16]],
) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


# 1.0, -2.0 and 0.5, little-endian.
FLOAT32 = bytes.fromhex("0000803f 000000c0 0000003f")
FLOAT16 = bytes.fromhex("003c 00c0 0038")


@pytest.mark.parametrize(("encoding", "payload"), [("ENCODING_FLOAT32", FLOAT32), ("ENCODING_FLOAT16", FLOAT16)])
def test_float_cells_are_little_endian_in_c_order(encoding: str, payload: bytes) -> None:
    """Float encodings hold the values themselves; the range beside them changes nothing."""
    values = decode_map(_message(encoding, payload, value_min=-9, value_max=9))

    assert np.float32 == values.dtype
    assert [[1.0, -2.0, 0.5]] == values.tolist()


def test_uint8_codes_are_linear_between_the_ends_of_the_range() -> None:
    """Code 0 is value_min, 255 is value_max, 51 a fifth between."""
    values = decode_map(_message("ENCODING_UINT8", bytes([0, 51, 255]), value_min=-1, value_max=4))

    assert [[-1.0, 0.0, 4.0]] == values.tolist()


def test_png8_is_read_as_uint8_is() -> None:
    """The file holds the same codes, in rows and columns."""
    codes = np.array([[0, 51], [102, 255]], np.uint8)

    values = decode_map(_message("ENCODING_PNG8", _png(codes), (2, 2), value_min=0, value_max=5))

    assert [[0.0, 1.0], [2.0, 5.0]] == values.tolist()


def test_png16_has_65535_as_its_largest_code() -> None:
    """Sixteen bits reach the server's value_max, too."""
    codes = np.array([[0, 13107, 65535]], np.uint16)

    values = decode_map(_message("ENCODING_PNG16", _png(codes), value_min=0, value_max=5))

    assert [[0.0, 1.0, 5.0]] == values.tolist()


def test_zlib_is_inflated_before_the_digest_is_checked() -> None:
    """The digest is that of the payload before compression."""
    message = _message(
        "ENCODING_FLOAT32",
        zlib.compress(FLOAT32),
        compression="COMPRESSION_ZLIB",
        payload_sha256=hashlib.sha256(FLOAT32).digest(),
    )

    assert [[1.0, -2.0, 0.5]] == decode_map(message).tolist()


def test_changed_bytes_are_refused() -> None:
    """One flipped bit shows in the digest."""
    message = _message("ENCODING_FLOAT32", FLOAT32)
    message.payload = FLOAT32[:-1] + b"\x3e"

    with pytest.raises(CorruptPayload, match="payload_sha256") as raised:
        decode_map(message)

    assert "PAYLOAD_CORRUPT" == raised.value.reason


@pytest.mark.parametrize(
    "message",
    [
        _message("ENCODING_FLOAT32", FLOAT32[:8]),
        _message("ENCODING_PNG8", b"not a png"),
        _message("ENCODING_PNG8", _png(np.zeros((5, 5), np.uint8))),
        _message("ENCODING_UINT8", b"not zlib", compression="COMPRESSION_ZLIB"),
        _message("ENCODING_UINT8", zlib.compress(bytes(10_000_000)), compression="COMPRESSION_ZLIB"),
        heatmap_pb2.Heatmap(
            encoding=99,  # type: ignore[arg-type]
            shape=[1, 1],
            payload_sha256=hashlib.sha256(b"").digest(),
        ),
    ],
    ids=["short", "no file", "other size", "no zlib", "inflates to far more", "unknown encoding"],
)
def test_payloads_that_are_not_what_the_message_says_are_refused(message: heatmap_pb2.Heatmap) -> None:
    """Nothing is guessed from broken bytes."""
    with pytest.raises(CorruptPayload):
        decode_map(message)


def test_overlays_are_pictures_and_hold_no_values() -> None:
    """The finished file is opened as it is; asking for its values says what to ask for instead."""
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    message = _message("ENCODING_OVERLAY_PNG", _png(pixels), (2, 3, 3))

    assert pixels.tolist() == np.asarray(decode_overlay(message)).tolist()
    with pytest.raises(ValueError, match="ask for 'uint8'"):
        decode_map(message)

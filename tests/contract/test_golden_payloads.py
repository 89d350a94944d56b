"""Golden payloads: the bytes of one small map in each exact encoding, worked out by hand from heatmap.proto.

Clients in other languages may copy this table; if it has to change, the contract has changed.
"""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from camserve.server.encode import encode
from camserve.server.jobs import Compression, Encoding, Geometry, Heatmap, RawMap, ResolvedTarget, Score, Spec

# Two rows of three cells; smallest -1, largest 1.5, so that a step of 8 bits is 2.5 / 255 and of 16 bits 2.5 / 65535.
_VALUES = np.array([[-1.0, 0.0, 0.5], [1.0, 1.5, 0.25]], np.float32)
_CODES_8 = [[0, 102, 153], [204, 255, 128]]  # 1.25 / 2.5 * 255 = 127.5 rounds to the even 128.
_CODES_16 = [[0, 26_214, 39_321], [52_428, 65_535, 32_768]]  # 32767.5 likewise.

_FLOAT32 = "000080bf 00000000 0000003f 0000803f 0000c03f 0000803e"
_FLOAT16 = "00bc 0000 0038 003c 003e 0034"
_UINT8 = "00 66 99 cc ff 80"


def _heatmap(encoding: Encoding, values: np.ndarray = _VALUES) -> Heatmap:
    raw = RawMap(
        spec_index=0,
        target=ResolvedTarget(class_index=0, score=Score.LOGIT, value=0.0),
        values=values,
        raw_min=-1.0,
        raw_max=1.5,
        flags=frozenset(),
        layers=("layer4",),
    )
    geometry = Geometry(source_width=6, source_height=4, input_width=6, input_height=4)
    return encode(
        raw, Spec(index=0, method="grad-cam", layers=("layer4",), encoding=encoding), label="", geometry=geometry
    )


@pytest.mark.parametrize(
    ("encoding", "payload"),
    [(Encoding.FLOAT32, _FLOAT32), (Encoding.FLOAT16, _FLOAT16), (Encoding.UINT8, _UINT8)],
)
def test_cells_are_these_bytes(encoding: Encoding, payload: str) -> None:
    """Cells go in C order, little-endian, uncompressed when that is shorter; the range stands beside."""
    heatmap = _heatmap(encoding)

    assert bytes.fromhex(payload) == heatmap.payload
    assert hashlib.sha256(bytes.fromhex(payload)).digest() == heatmap.payload_sha256
    assert hashlib.sha256(bytes.fromhex(_FLOAT32)).digest() == heatmap.raw_sha256
    assert (Compression.NONE, (2, 3), ("h", "w")) == (heatmap.compression, heatmap.shape, heatmap.axes)
    assert (-1.0, 1.5) == (heatmap.value_min, heatmap.value_max)


@pytest.mark.parametrize(
    ("encoding", "mode", "codes"), [(Encoding.PNG8, "L", _CODES_8), (Encoding.PNG16, "I;16", _CODES_16)]
)
def test_png_files_hold_these_codes(encoding: Encoding, mode: str, codes: list[list[int]]) -> None:
    """PNG files are gray, of 8 or 16 bits; their compressed bytes belong to the PNG library, their pixels to us."""
    image = Image.open(io.BytesIO(_heatmap(encoding).payload))

    assert codes == np.asarray(image).tolist()
    assert mode == image.mode


def test_compressed_cells_are_zlib() -> None:
    """A payload that shrinks carries RFC 1950's header; its digest is of the bytes before."""
    heatmap = _heatmap(Encoding.UINT8, np.zeros((8, 8), np.float32))

    assert Compression.ZLIB == heatmap.compression
    assert 0x78 == heatmap.payload[0]
    assert hashlib.sha256(bytes(64)).digest() == heatmap.payload_sha256


def test_geometry_places_cells_on_the_source() -> None:
    """Three columns on six pixels: two pixels a cell, the first centre between pixels 0 and 1."""
    geometry = _heatmap(Encoding.UINT8).geometry

    assert geometry is not None
    assert (2.0, 0.5, 2.0, 0.5) == (geometry.scale_x, geometry.offset_x, geometry.scale_y, geometry.offset_y)

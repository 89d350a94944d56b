"""What an image file says of itself before any pixel is decoded: its format, size, number of frames and orientation.

Bytes of a JPEG, PNG, WebP, BMP or TIFF file arrive; a `Header` leaves. The door calls it on the event loop, so it walks chunk
tables only and is bounded in time and memory whatever the bytes. Our own reader rather than Pillow's, because Pillow's allocates
by what a file claims (WebP canvases, TIFF and EXIF entries) before anyone can look at the size.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import struct
from collections.abc import Iterator

import numpy as np

from camserve.server.bands import bands

__all__ = ["Header", "HeaderError", "ImageFormat", "read_header"]

# Far above any real file, low enough to keep a hostile one from holding the event loop.
_MAX_CHUNKS = 65_536
_MAX_DIRECTORY_ENTRIES = 4_096
# Every scan of a JPEG is a pass over all its blocks. Progressive encoders write about ten, sequential ones one a component.
_MAX_PROGRESSIVE_SCANS = 64
_MAX_SEQUENTIAL_SCANS = 8

# What reading past the end gives; OverflowError for 64-bit offsets of BigTIFF.
_CUT_SHORT = (struct.error, IndexError, OverflowError)

_ORIENTATION_TAG = 0x0112
_TILE_TAGS = (322, 323)
_FIELD_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGER_FORMATS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q"}

# Formats people send by mistake; naming them helps more than showing bytes.
_FOREIGN = (
    (re.compile(rb"GIF8"), "a GIF"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "an AVIF"),
    (re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL), "a HEIC"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "a JPEG XL"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"\s*<(\?xml|svg|!DOCTYPE|html)", re.IGNORECASE), "an SVG, XML or HTML"),
    (re.compile(rb"\x1f\x8b|PK\x03\x04"), "an archive"),
)


class ImageFormat(enum.StrEnum):
    """The formats taken."""

    JPEG = "JPEG"
    PNG = "PNG"
    WEBP = "WebP"
    BMP = "BMP"
    TIFF = "TIFF"


class HeaderError(ValueError):
    """The bytes are not one still image of a format we take; the text says why."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of itself.

    Attributes:
        format: by content, whatever the file was called.
        width: pixels as stored, before orientation.
        height: likewise.
        orientation: EXIF orientation, 1 to 8; 1 when absent or unreadable.
        tile: (width, height) of a TIFF file's tiles, which are decoded whole however little of them is shown; (0, 0) without.
        is_buffered: whether a JPEG file takes several passes, for which its decoder holds all coefficients.
    """

    format: ImageFormat
    width: int
    height: int
    orientation: int = 1
    tile: tuple[int, int] = (0, 0)
    is_buffered: bool = False


def read_header(data: bytes) -> Header:
    """Reads a file's header.

    Raises:
        HeaderError: no bytes, unknown format, several frames, or a header that is broken or claims more than the file holds.
    """
    if not data:
        raise HeaderError("it is empty: no bytes arrived")
    try:
        header = _read(data)
    except _CUT_SHORT as error:
        raise HeaderError("its header is cut short or corrupt") from error
    if header.width < 1 or header.height < 1:
        raise HeaderError(f"its {header.format} header claims {header.width} x {header.height} pixels")
    return header


def _read(data: bytes) -> Header:
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp(data)
    if data.startswith(b"BM"):
        return _read_bmp(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _read_tiff(data)
    for pattern, name in _FOREIGN:
        if pattern.match(data):
            raise HeaderError(f"it is {name} file")
    # They are not quoted: the text goes to the log, where image bytes have no place.
    raise HeaderError("its first bytes are of no known image format")


def _read_jpeg(data: bytes) -> Header:
    size: tuple[int, int] | None = None
    is_progressive = is_buffered = False
    components = 0
    exif = b""
    for marker, start, stop in _jpeg_segments(data, 2):
        if marker == 0xDA:
            is_buffered = is_progressive or data[start] < components
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, start + 1)
            size, components = (width, height), data[start + 5]
            is_progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
        elif marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            # Long EXIF data is spread over several segments.
            exif += data[start + 6 : stop]
    if size is None:
        raise HeaderError("it is a JPEG file without a frame header")
    # In compressed data 0xff is escaped, so that counting finds scans (and, rarely, chance bytes in metadata).
    kind, most = ("progressive", _MAX_PROGRESSIVE_SCANS) if is_progressive else ("sequential", _MAX_SEQUENTIAL_SCANS)
    if _scan_markers(data) > most:
        scans = sum(marker == 0xDA for marker, _, _ in _jpeg_segments(data, 2))
        if scans > most:
            raise HeaderError(f"it is a {kind} JPEG file of {scans} scans; at most {most} are taken")
    return Header(
        format=ImageFormat.JPEG,
        width=size[0],
        height=size[1],
        orientation=_orientation(exif),
        is_buffered=is_buffered,
    )


def _scan_markers(data: bytes) -> int:
    """Counts 0xff 0xda, as `bytes.count` does in three times as long; the event loop waits for this, by megabytes."""
    octets = np.frombuffer(data, np.uint8)
    found = 0
    for band in bands(len(data) - 1):
        is_marker = octets[band] == 0xFF
        is_marker &= octets[band.start + 1 : band.stop + 1] == 0xDA
        found += int(np.count_nonzero(is_marker))
    return found


_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")


def _jpeg_segments(data: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, first content byte, byte after) up to the end of the first image."""
    for _ in range(_MAX_CHUNKS):
        found = _MARKER.search(data, position)
        if found is None or data[found.start() + 1] == 0xD9:
            return
        start = found.end()
        stop = start + int(struct.unpack_from(">H", data, start)[0])
        if stop < start + 2:
            raise HeaderError("it is a JPEG file with a corrupt segment length")
        yield data[found.start() + 1], start + 2, stop
        position = stop
    raise HeaderError(f"it is a JPEG file of more than {_MAX_CHUNKS} segments")


def _read_png(data: bytes) -> Header:
    width, height = 0, 0
    exif = b""
    position = 8
    for index in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, position)
        content = position + 8
        if (index == 0) != (name == b"IHDR"):
            raise HeaderError("it is a PNG file whose header chunk is missing or repeated")
        if name == b"IHDR":
            width, height = struct.unpack_from(">II", data, content)
        elif name == b"acTL":
            _refuse_frames("an animated PNG", struct.unpack_from(">I", data, content)[0])
        elif name == b"eXIf":
            exif = data[content : content + length]
        elif name == b"IEND":
            break
        position = content + length + 4
    else:
        raise HeaderError(f"it is a PNG file of more than {_MAX_CHUNKS} chunks")
    return Header(format=ImageFormat.PNG, width=width, height=height, orientation=_orientation(exif))


def _read_webp(data: bytes) -> Header:
    size: tuple[int, int] | None = None
    exif = b""
    frames = 0
    position = 12
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, position)
        content = position + 8
        if name == b"VP8X":
            size = (1 + int.from_bytes(data[content + 4 : content + 7], "little"), 1 + _u24(data, content + 7))
        elif name == b"VP8 " and size is None:
            width, height = struct.unpack_from("<HH", data, content + 6)
            size = (width & 0x3FFF, height & 0x3FFF)
        elif name == b"VP8L" and size is None:
            (bits,) = struct.unpack_from("<I", data, content + 1)
            size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif name == b"ANMF":
            frames += 1
        elif name == b"EXIF":
            exif = data[content : content + length]
        position = content + length + (length & 1)
    else:
        raise HeaderError(f"it is a WebP file of more than {_MAX_CHUNKS} chunks")
    _refuse_frames("an animated WebP", frames)
    if size is None:
        raise HeaderError("it is a WebP file without an image chunk")
    return Header(format=ImageFormat.WEBP, width=size[0], height=size[1], orientation=_orientation(exif))


def _u24(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 3], "little")


def _read_bmp(data: bytes) -> Header:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header_bytes == 12 else "<ii", data, 18)
    # A negative height says that rows run from top to bottom.
    return Header(format=ImageFormat.BMP, width=width, height=abs(height))


def _read_tiff(data: bytes) -> Header:
    directory = _Directory.read(data)
    if directory.has_next:
        _refuse_frames("a TIFF", 2)
    if any(tag in directory.unread for tag in _TILE_TAGS):
        raise HeaderError("it is a TIFF file whose tile size is not one integer")
    width, height = directory.integers.get(256, 0), directory.integers.get(257, 0)
    # Strips, unlike tiles, end with the picture, whatever their tag says.
    tile_width, tile_height = (max(0, directory.integers.get(tag, 0)) for tag in _TILE_TAGS)
    return Header(
        format=ImageFormat.TIFF,
        width=width,
        height=height,
        orientation=_valid(directory.integers.get(_ORIENTATION_TAG, 1)),
        tile=(tile_width, tile_height),
    )


def _refuse_frames(kind: str, frames: int) -> None:
    if frames > 1:
        raise HeaderError(f"it is {kind} file of several frames; send one frame at a time")


def _orientation(exif: bytes) -> int:
    """Reads EXIF orientation. Broken EXIF does not spoil the pixels: it counts as absent, as in browsers."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    try:
        return _valid(_Directory.read(exif).integers.get(_ORIENTATION_TAG, 1))
    except _CUT_SHORT:
        return 1


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


@dataclasses.dataclass(frozen=True, slots=True)
class _Directory:
    """First directory of a TIFF file or EXIF block; of entries of the same tag the first counts, as for libtiff.

    Attributes:
        integers: of the entries that hold one integer.
        unread: tags of the others.
        has_next: whether another directory follows.
    """

    integers: dict[int, int]
    unread: frozenset[int]
    has_next: bool

    @classmethod
    def read(cls, data: bytes) -> _Directory:
        """Reads it.

        Raises:
            HeaderError: the entries claim more bytes than the file has. Entries may point at the same bytes, so that a small
                file could make a reader that copies each of them run out of memory.
            struct.error, OverflowError: cut short.
        """
        order = "<" if data[:2] == b"II" else ">"
        is_big = data[2:4] in (b"+\0", b"\0+")
        word, entry_format = ("Q", "HHQ8s") if is_big else ("I", "HHI4s")
        (position,) = struct.unpack_from(order + word, data, 8 if is_big else 4)
        count_format = order + ("Q" if is_big else "H")
        (count,) = struct.unpack_from(count_format, data, position)
        if count > _MAX_DIRECTORY_ENTRIES:
            raise HeaderError(f"its directory claims {count} entries; at most {_MAX_DIRECTORY_ENTRIES} are taken")
        position += struct.calcsize(count_format)
        entry = struct.Struct(order + entry_format)
        integers: dict[int, int] = {}
        unread: set[int] = set()
        claimed = 0
        for _ in range(count):
            tag, kind, values, content = entry.unpack_from(data, position)
            position += entry.size
            claimed += min(values * _FIELD_BYTES.get(kind, 1), len(data))
            if tag in integers or tag in unread:
                continue
            # Eight bytes do not fit into an entry of the classic form: it holds where they are.
            if values == 1 and kind in _INTEGER_FORMATS and (is_big or kind not in (16, 17)):
                integers[tag] = struct.unpack_from(order + _INTEGER_FORMATS[kind], content)[0]
            else:
                unread.add(tag)
        if claimed > 2 * len(data) + 4_096:
            raise HeaderError("its directory entries claim more bytes than the file has")
        (following,) = struct.unpack_from(order + word, data, position) if position + 4 <= len(data) else (0,)
        return cls(integers, frozenset(unread), following != 0)

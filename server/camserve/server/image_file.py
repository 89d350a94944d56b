"""Turns the bytes of an image file into upright 8-bit pixels, with Pillow kept on a short leash.

`decode.py` calls it with a header that `image_header.py` has read and the door has accepted. One of five plugins is called by
name, never `Image.open`: no other format can be reached, and Pillow's process-wide pixel limit and plugin registry play no part.

Conversions, all as `Image.convert("RGB")` does for the training pipelines that models come from, except where noted:
    alpha       dropped, not composited: colours under transparent pixels show
    palette     looked up; transparency dropped likewise
    16-bit gray scaled over its full range (Pillow would clip at 255); 12-bit TIFF likewise
    CMYK        Pillow's plain conversion, Adobe inversion undone, colour profiles ignored
    float, 32-bit and Lab refused: their range is not known; send a tensor
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import threading
import warnings
from typing import Final, Literal, TypeAlias

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from camserve.server.bands import bands
from camserve.server.image_header import Header, ImageFormat

__all__ = ["Box", "ImageFileError", "Mode", "Pixels", "load_pixels"]

Mode: TypeAlias = Literal["RGB", "L"]

_PLUGINS: Final[dict[ImageFormat, type[ImageFile.ImageFile]]] = {
    ImageFormat.JPEG: JpegImagePlugin.JpegImageFile,
    ImageFormat.PNG: PngImagePlugin.PngImageFile,
    ImageFormat.WEBP: WebPImagePlugin.WebPImageFile,
    ImageFormat.BMP: BmpImagePlugin.BmpImageFile,
    ImageFormat.TIFF: TiffImagePlugin.TiffImageFile,
}

# EXIF orientation -> what puts the picture upright.
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box: TypeAlias = tuple[float, float, float, float]


class ImageFileError(ValueError):
    """The file cannot be decoded; the text says why."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """A decoded picture, upright.

    Attributes:
        image: mode RGB or L, whose gray is that of all three colours; smaller than the source when it was decoded at reduced
            size.
        width: of the source after orientation.
        height: likewise.
        box: (left, top, right, bottom): the part of `image` that the source's rectangle covers exactly. A reduced JPEG's last
            row and column may stand for fewer source pixels than the others.
    """

    image: Image.Image
    width: int
    height: int
    box: Box


def load_pixels(data: bytes, header: Header, *, mode: Mode, least: tuple[int, int] | None = None) -> Pixels:
    """Decodes a file.

    Args:
        data: the whole file.
        header: what `read_header` said of it.
        mode: what to convert to; gray that is stored as such stays L, for it is resized in half the time.
        least: (width, height), upright, that the caller needs; a JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size,
            never below twice what is needed. None decodes in full.

    Raises:
        ImageFileError: truncated, corrupt, or pixels of a kind that cannot be shown in 8 bits.
    """
    _silence_pillow()
    try:
        return _load(data, header, mode, least)
    except ImageFileError:
        raise
    except Exception as error:
        # Pillow's parsers raise whatever their arithmetic on hostile bytes gives.
        raise ImageFileError(f"its {header.format} data is truncated or corrupt ({_first_line(error)})") from error


def _load(data: bytes, header: Header, mode: Mode, least: tuple[int, int] | None) -> Pixels:
    if header.format is ImageFormat.PNG:
        # Decoding skips the checksums and whatever is missing behind the last row; this looks at both.
        PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()
    image = _PLUGINS[header.format](io.BytesIO(data))
    if sorted(image.size) != sorted((header.width, header.height)):
        # What the door admitted is not what Pillow would allocate.
        raise ImageFileError(f"its {header.format} header is contradictory about the size")
    is_turned = header.orientation >= 5
    width, height = (header.height, header.width) if is_turned else (header.width, header.height)
    box: Box = (0.0, 0.0, float(header.width), float(header.height))
    if least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        wanted = (least[1], least[0]) if is_turned else least
        drafted = image.draft(None, (2 * wanted[0], 2 * wanted[1]))
        box = box if drafted is None else drafted[1]
    if header.format is ImageFormat.JPEG:
        # Pillow feeds its decoder 64 KB at a time, and after each takes its turn among the threads that want to run Python.
        image.decodermaxblock = max(len(data), ImageFile.MAXBLOCK)
    image.load()
    bits = _stored_bits(image)
    stored_width, stored_height = image.size
    plain = _to_mode(image, mode, bits)
    del image  # Lest turning hold a third picture.
    if header.format is ImageFormat.TIFF:
        # Pillow has turned it while loading.
        return Pixels(image=plain, width=plain.width, height=plain.height, box=(0, 0, plain.width, plain.height))
    if header.orientation != 1:
        plain = plain.transpose(_UPRIGHT[header.orientation])
        box = _turn_box(box, header.orientation, stored_width, stored_height)
    return Pixels(image=plain, width=width, height=height, box=box)


def _turn_box(box: Box, orientation: int, width: int, height: int) -> Box:
    """Moves a rectangle with the picture; width and height are the picture's before turning."""
    left, top, right, bottom = box
    if orientation in (2, 3, 7, 8):  # Mirrored left to right before any exchange of axes.
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):  # Likewise top to bottom.
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


def _stored_bits(image: ImageFile.ImageFile) -> tuple[int, bool]:
    """Bits that a 16-bit gray image uses, and whether its zero means white."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
        return int(bits[0]), image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return 16, False


def _to_mode(image: Image.Image, mode: Mode, bits: tuple[int, bool]) -> Image.Image:
    # Pillow would try to carry transparency along, and warn.
    image.info.pop("transparency", None)
    if image.mode in (mode, "L"):
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and isinstance(image, PngImagePlugin.PngImageFile)):
        eight = Image.new("L", image.size)
        for band in bands(image.height, image.width):
            part = np.asarray(image.crop((0, band.start, image.width, band.stop)))
            eight.paste(Image.fromarray(_sixteen_to_eight(part, bits)), (0, band.start))
        return eight
    if image.mode in ("I", "F", "LAB"):
        kind = {"I": "signed or 32-bit integer", "F": "float", "LAB": "Lab"}[image.mode]
        raise ImageFileError(f"it holds {kind} pixels, whose range is unknown; send 8 or 16 bits, or a tensor")
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    # Converting to the same mode would copy.
    colour = image.convert("RGB")
    return colour if mode == "RGB" else colour.convert(mode)


def _sixteen_to_eight(
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], bits: tuple[int, bool]
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Maps the full range onto 0 to 255, rounding to the nearest."""
    used_bits, zero_is_white = bits
    largest = (1 << min(used_bits, 16)) - 1
    table = ((np.arange(65_536, dtype=np.uint32) * 255 + largest // 2) // largest).clip(0, 255).astype(np.uint8)
    if zero_is_white:
        table = np.uint8(255) - table
    return table[values.astype(np.uint16)]


# Pillow quotes the bytes that it stumbled over; they are a caller's, and the text goes to the log.
_QUOTED_BYTES: Final = re.compile(r"""b'(?:[^'\\]|\\.)*'|b"(?:[^"\\]|\\.)*\"""")


def _first_line(error: Exception) -> str:
    text = _QUOTED_BYTES.sub("…", str(error)).partition("\n")[0][:120]
    return text or type(error).__name__


_FILTER_LOCK = threading.Lock()
_PIL_MODULES: Final = r"PIL\."


def _silence_pillow() -> None:
    """Keeps Pillow's complaints about odd metadata off stderr, and from becoming exceptions where warnings are errors.

    `warnings.catch_warnings` changes the whole process and is not safe in a pool of threads; a filter that stays, and names
    Pillow's modules only, is. It is put back in front when somebody has filtered since.
    """
    front = warnings.filters[0] if warnings.filters else None
    if front is not None and front[0] == "ignore" and getattr(front[3], "pattern", None) == _PIL_MODULES:
        return
    with _FILTER_LOCK:
        warnings.filterwarnings("ignore", module=_PIL_MODULES)


# Pillow also logs an error for some refused TIFF files; the refusal says it all.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

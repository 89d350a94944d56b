"""Decoding: every kind of pixel we take, every refusal, and nothing but refusals for hostile bytes."""

import gc
import io
import itertools
import struct
import sys
import time
import traceback
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from camserve.server.decode import DecodeLimits, Region, decode, measure
from camserve.server.errors import CamserveError, InvalidRequest, Reason
from camserve.server.image_header import _scan_markers
from camserve.server.jobs import EncodedImage, JobInput, PixelFormat, RawFrame, TensorInput
from camserve.server.models.recipe import Channels, InputRecipe

_LIMITS = DecodeLimits()
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")


def _pixel_recipe(height: int, width: int) -> InputRecipe:
    """Hands pixels through as they are."""
    return InputRecipe(shape=(3, height, width), dtype="uint8", scale=1)


def _file(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _ramp(width: int = 24, height: int = 17) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 10, y * 14, (x + y) * 6], axis=-1).astype(np.uint8))


def _decoded(data: bytes, width: int, height: int) -> np.ndarray:
    """(h w 3) pixels as the model would see them."""
    sample = decode(EncodedImage(data=data), _pixel_recipe(height, width), _LIMITS, keep_source=False)
    return np.moveaxis(sample.tensor, 0, -1)


def _refusal(payload: JobInput, recipe: InputRecipe | None = None, limits: DecodeLimits = _LIMITS) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refusal:
        decode(payload, recipe or _pixel_recipe(4, 4), limits, keep_source=False)
    return refusal.value


@pytest.mark.parametrize("file_format", _FORMATS)
def test_every_format_gives_its_pixels(file_format: str) -> None:
    """The five formats decode to their pixels, and the door counts them right."""
    data = _file(_ramp(), file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    tolerance = 25 if file_format == "JPEG" else 0

    assert 24 * 17 == measure(EncodedImage(data=data), _LIMITS)
    assert np.abs(_decoded(data, 24, 17).astype(int) - np.asarray(_ramp())).max() <= tolerance


@pytest.mark.parametrize(
    ("file_format", "modes"),
    [
        ("PNG", ["1", "L", "P", "LA", "RGBA"]),
        ("JPEG", ["L", "CMYK"]),
        ("WEBP", ["RGBA"]),
        ("BMP", ["1", "L", "P"]),
        ("TIFF", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"]),
    ],
)
def test_modes_convert_as_in_training_pipelines(file_format: str, modes: list[str]) -> None:
    """Gray, palette, alpha, 1-bit and CMYK files give what Pillow's convert('RGB') gives: alpha is dropped."""
    for mode in modes:
        image = _ramp().convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        data = _file(image, file_format, **({"lossless": True, "exact": True} if file_format == "WEBP" else {}))
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

        np.testing.assert_array_equal(_decoded(data, 24, 17), expected, err_msg=mode)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "frame"])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_gray_pictures_give_each_colour_its_own_norm(file_format: str, channels: Channels) -> None:
    """Gray is resized once, yet the model sees what it would of the same picture in colour, and so does the overlay."""
    gray = _ramp(90, 70).convert("L")
    data = _file(gray, "JPEG" if file_format == "frame" else file_format)
    stored = Image.open(io.BytesIO(data))
    payload = _frame(PixelFormat.MONO8, np.asarray(stored), 90) if file_format == "frame" else EncodedImage(data=data)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    recipe = InputRecipe(shape=(3, 32, 40), resize="letterbox", channels=channels, mean=mean, std=std, pad_value=9)
    colour = RawFrame(
        pixel_format=PixelFormat.RGB8, width=90, height=70, stride=270, data=stored.convert("RGB").tobytes()
    )
    expected = decode(colour, recipe, _LIMITS, keep_source=True)

    found = decode(payload, recipe, _LIMITS, keep_source=True)

    np.testing.assert_array_equal(found.tensor, expected.tensor)
    np.testing.assert_array_equal(found.source, expected.source)


def test_a_jpeg_goes_to_its_decoder_in_one_piece() -> None:
    """In pieces, the thread would queue for the interpreter after each, behind the event loop and other requests."""
    noise = np.random.default_rng(3).integers(0, 255, (400, 500, 3), dtype=np.uint8)
    data = _file(Image.fromarray(noise), "JPEG", quality=95)
    calls: list[str] = []

    def note(_frame: object, event: str, called: object) -> None:
        if event == "c_call":
            calls.append(getattr(called, "__qualname__", ""))

    sys.setprofile(note)
    try:
        decode(EncodedImage(data=data), _pixel_recipe(400, 500), _LIMITS, keep_source=False)
    finally:
        sys.setprofile(None)

    assert len(data) > 3 * ImageFile.MAXBLOCK
    assert 1 == calls.count("ImagingDecoder.decode")


def test_transparent_palette_entries_keep_their_colour() -> None:
    """Palette transparency is dropped like any alpha."""
    image = _ramp().quantize(16)
    expected = np.asarray(image.convert("RGB"))

    np.testing.assert_array_equal(_decoded(_file(image, "PNG", transparency=bytes(range(16))), 24, 17), expected)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(file_format: str) -> None:
    """The full range 0 to 65535 maps to 0 to 255, to the nearest."""
    values = np.array([[0, 128, 129, 257, 32_768, 65_406, 65_407, 65_535]], np.uint16)
    data = _file(Image.fromarray(values), file_format)

    assert [0, 0, 1, 1, 128, 254, 255, 255] == _decoded(data, 8, 1)[0, :, 1].tolist()


@pytest.mark.parametrize(
    ("kind", "photometric", "expected"), [("<", 1, [0, 1, 255]), (">", 1, [0, 1, 255]), ("<", 0, [255, 254, 0])]
)
def test_sixteen_bit_tiff_byte_order_and_polarity(kind: str, photometric: int, expected: list[int]) -> None:
    """Both byte orders of a 16-bit TIFF are read, and its white-is-zero form is turned round."""
    pixels = np.array([0, 257, 65_535], kind + "u2").tobytes()
    entries = [
        (256, 3, 3),
        (257, 3, 1),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (279, 4, 6),
    ]
    directory = struct.pack(kind + "H", len(entries))
    for tag, code, value in entries:
        directory += struct.pack(kind + ("HHIHxx" if code == 3 else "HHII"), tag, code, 1, value)
    header = (b"II*\0" if kind == "<" else b"MM\0*") + struct.pack(kind + "I", 8 + len(pixels))

    assert expected == _decoded(header + pixels + directory + bytes(4), 3, 1)[0, :, 0].tolist()


def _chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _tiled_tiff(tile_width: int, tile_height: int, code: int = 4, count: int = 1) -> bytes:
    """A deflated gray TIFF file of 16 x 16 pixels in one tile, almost all of whose data is missing when it is large."""
    packed = zlib.compress(bytes(256))
    entries = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 4, 1, 8), (259, 4, 1, 8), (262, 4, 1, 1), (277, 4, 1, 1)]
    entries += [
        (322, code, count, tile_width),
        (323, code, count, tile_height),
        (324, 4, 1, 134),
        (325, 4, 1, len(packed)),
    ]
    return (
        b"II*\0"
        + struct.pack("<IH", 8, 10)
        + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        + bytes(4)
        + packed
    )


@pytest.mark.parametrize("code", [3, 4, 9, 13], ids=["SHORT", "LONG", "SLONG", "IFD"])
def test_tiles_count_like_pixels(code: int) -> None:
    """A tile far larger than its TIFF picture would be allocated whole: the door refuses it in whichever type it is written."""
    bomb = EncodedImage(data=_tiled_tiff(20_480, 20_480, code))

    with pytest.raises(InvalidRequest, match="20480 x 20480 pixels is over the limit") as refusal:
        measure(bomb, _LIMITS)

    assert Reason.IMAGE_TOO_LARGE == refusal.value.reason
    assert 256 + 32 * 64 == measure(EncodedImage(data=_tiled_tiff(32, 64, code)), _LIMITS)
    assert [0] * 256 == _decoded(_tiled_tiff(16, 16), 16, 16)[..., 0].ravel().tolist()


@pytest.mark.parametrize(("code", "count"), [(16, 1), (17, 1), (4, 2), (11, 1)])
def test_tile_sizes_that_cannot_be_read_are_refused(code: int, count: int) -> None:
    """What the door cannot read, the decoder shall not read otherwise."""
    error = _refusal(EncodedImage(data=_tiled_tiff(8, 8, code, count)))

    assert Reason.IMAGE_UNDECODABLE == error.reason
    assert "tile" in error.message


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits_spans_the_range(bits: int) -> None:
    """Gray PNG files of 1, 2 and 4 bits reach from black to white."""
    header = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
    row = bytes([0, (1 << bits) - 1])  # Black but for the last pixel.
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(row)) + _chunk(b"IEND", b"")

    assert [0] * (8 // bits - 1) + [255] == _decoded(data, 8 // bits, 1)[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no bytes"),
        (b"this is a text file, renamed .jpg", "no known image format"),
        (_file(_ramp(), "GIF"), "a GIF"),
        (b"\0\0\0\x20ftypheic", "a HEIC"),
        (b"<svg></svg>", "SVG"),
        (b"%PDF-1.7", "a PDF"),
        (b"\xff\xd8\xff", "without a frame header"),
        (b"\x89PNG\r\n\x1a\n", "0 x 0"),
        (_file(_ramp(), "WEBP", save_all=True, append_images=[Image.new("RGB", (24, 17))]), "animated WebP"),
        (_file(_ramp(), "PNG", save_all=True, append_images=[Image.new("RGB", (24, 17))]), "animated PNG"),
        (_file(_ramp(), "TIFF", save_all=True, append_images=[Image.new("RGB", (24, 17))]), "several frames"),
        (_file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "float pixels"),
        (_file(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "32-bit integer"),
    ],
)
def test_what_is_not_a_still_image_is_refused(data: bytes, says: str) -> None:
    """The refusal says what arrived and what is taken."""
    error = _refusal(EncodedImage(data=data))

    assert Reason.IMAGE_UNDECODABLE == error.reason
    assert says in error.message
    assert "JPEG, PNG, WebP, BMP, TIFF" in error.message


@pytest.mark.parametrize("file_format", _FORMATS)
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(file_format: str, kept: float) -> None:
    """A file that lacks its end is never shown half gray."""
    noise = np.random.default_rng(3).integers(0, 255, (60, 70, 3), dtype=np.uint8)
    data = _file(Image.fromarray(noise), file_format)

    assert Reason.IMAGE_UNDECODABLE == _refusal(EncodedImage(data=data[: int(len(data) * kept)])).reason
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def _pictures_alive() -> set[int]:
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), Image.Image)}


def test_nothing_of_a_picture_outlives_its_decoding() -> None:
    """Neither a sample nor a refusal, while somebody still holds it, keeps a decoded picture until the garbage collector runs."""
    noise = np.random.default_rng(3).integers(0, 255, (60, 70, 3), dtype=np.uint8)
    held: list[object] = []
    gc.collect()
    gc.disable()
    try:
        before = _pictures_alive()
        for file_format, keep_source, kept in itertools.product(_FORMATS, (False, True), (1.0, 0.9, 0.05)):
            data = _file(Image.fromarray(noise), file_format)
            payload = EncodedImage(data=data[: int(len(data) * kept)])
            try:
                held.append(decode(payload, _pixel_recipe(4, 4), _LIMITS, keep_source=keep_source))
            except InvalidRequest as error:
                held.append(error)
        after = _pictures_alive()
    finally:
        gc.enable()

    assert 30 == len(held)
    assert set() == after - before


@pytest.mark.parametrize("payload", [EncodedImage(data=b"BM"), TensorInput(dtype="uint8", shape=(3,), data=b"")])
def test_a_refusal_keeps_no_frame_of_the_decoder(payload: JobInput) -> None:
    """A traceback keeps every frame's variables alive, so the refusal has none but decode's own, and no cause."""
    error = _refusal(payload)

    assert (None, None) == (error.__cause__, error.__context__)
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert ["_refusal", "decode"] == frames


def test_a_flipped_bit_in_a_png_is_noticed() -> None:
    """PNG checksums are looked at, which Pillow leaves out while decoding."""
    data = bytearray(_file(_ramp(), "PNG", compress_level=0))
    data[len(data) // 2] ^= 1

    assert Reason.IMAGE_UNDECODABLE == _refusal(EncodedImage(data=bytes(data))).reason


def test_a_refusal_quotes_no_bytes_of_the_picture() -> None:
    """Pillow would name the chunk that it stumbled over by its bytes, which are the caller's; the text goes to the log."""
    data = _file(_ramp(), "PNG").replace(b"IDAT", b"hush")

    message = _refusal(EncodedImage(data=data)).message

    assert "hush" not in message
    assert "(bad header checksum in …)" in message


@pytest.mark.parametrize("file_format", _FORMATS)
def test_too_many_pixels_are_refused_from_the_header(file_format: str) -> None:
    """The limit is looked at before anything is decoded, and told."""
    payload = EncodedImage(data=_file(_ramp(), file_format))
    limits = DecodeLimits(max_pixels=24 * 17 - 1)

    with pytest.raises(InvalidRequest, match="24 x 17 pixels is over the limit of 407") as refusal:
        measure(payload, limits)

    assert Reason.IMAGE_TOO_LARGE == refusal.value.reason
    assert Reason.IMAGE_TOO_LARGE == _refusal(payload, limits=limits).reason
    assert 24 * 17 == measure(payload, DecodeLimits(max_pixels=24 * 17))


def test_decompression_bombs_are_refused_whatever_pillow_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our limit holds with Pillow's own switched off, and Pillow's does not stand in for it."""
    bomb = _file(Image.new("1", (8_000, 8_000)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    assert Reason.IMAGE_TOO_LARGE == _refusal(EncodedImage(data=bomb)).reason

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)

    assert (17, 24, 3) == _decoded(_file(_ramp(), "PNG"), 24, 17).shape


def test_too_many_bytes_are_refused() -> None:
    """The limit on bytes holds for every kind of input."""
    limits = DecodeLimits(max_bytes=10)

    assert Reason.IMAGE_TOO_LARGE == _refusal(EncodedImage(data=bytes(11)), limits=limits).reason
    assert (
        Reason.IMAGE_TOO_LARGE
        == _refusal(TensorInput(dtype="uint8", shape=(11,), data=bytes(11)), limits=limits).reason
    )


@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_directories_that_point_everywhere_at_once_are_refused(prefix: bytes) -> None:
    """Thousands of entries sharing the same bytes would be copied one by one: 64 KB of EXIF into hundreds of MB."""
    body = b"".join(struct.pack("<HHII", tag, 7, 50_000, 8) for tag in range(1_000, 4_000))
    directory = b"II*\0" + struct.pack("<IH", 8, 3_000) + body + bytes(30_000)
    exif = _file(_ramp(), "JPEG", exif=b"Exif\0\0" + directory[:65_000]) if prefix else directory

    error = _refusal(EncodedImage(data=exif))

    assert Reason.IMAGE_UNDECODABLE == error.reason
    assert "claim more bytes" in error.message


def _jpeg_of_scans(scans: int, sof: int, size: int = 64) -> bytes:
    """A JPEG file in three components whose scans hold one component and no data each."""

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    tables = segment(0xDB, b"\0" + b"\1" * 64)
    tables += b"".join(segment(0xC4, bytes([kind, 1]) + bytes(16)) for kind in (0x00, 0x10))
    frame = segment(sof, struct.pack(">BHHB", 8, size, size, 3) + b"\1\x11\0\2\x11\0\3\x11\0")
    body = b"".join(segment(0xDA, bytes([1, 1 + index % 3, 0, 0, 63, 0])) + b"\0" for index in range(scans))
    return b"\xff\xd8" + tables + frame + body + b"\xff\xd9"


@given(
    st.lists(st.sampled_from([b"\xff", b"\xda", b"\0"]), max_size=40),
    st.sampled_from([0, 1, 131_068, 131_071, 131_072]),
)
@settings(max_examples=60)
def test_scans_are_counted_over_the_edges_of_bands(pieces: list[bytes], zeros: int) -> None:
    """The count is that of `bytes.count`, wherever a marker lies."""
    data = bytes(zeros) + b"".join(pieces)

    assert data.count(b"\xff\xda") == _scan_markers(data)


@pytest.mark.parametrize(
    ("sof", "most"),
    [(0xC0, 8), (0xC1, 8), (0xC9, 8), (0xC2, 64)],
    ids=["baseline", "extended", "arithmetic", "progressive"],
)
def test_jpeg_files_of_too_many_scans_are_refused(sof: int, most: int) -> None:
    """Each scan is a pass over the whole picture, in sequential files as well, however few bytes it has."""
    expected = f"{most + 1} scans; at most {most} are taken"

    assert expected in _refusal(EncodedImage(data=_jpeg_of_scans(most + 1, sof))).message
    assert 64 * 64 == measure(EncodedImage(data=_jpeg_of_scans(most, sof)), _LIMITS)


def test_a_baseline_jpeg_of_one_scan_for_each_component_is_taken() -> None:
    """Colours that follow each other rather than mix are legal."""
    assert (64, 64, 3) == _decoded(_jpeg_of_scans(3, 0xC0), 64, 64).shape


def test_slivers_do_not_become_gigabytes() -> None:
    """A row of pixels, whose crop would first be resized to 256 x 10 million, costs no more than its crop."""
    recipe = InputRecipe.imagenet()
    sliver = np.zeros((1, 40_001, 3), np.uint8)
    sliver[0, 20_000] = 255

    sample = decode(EncodedImage(data=_file(Image.fromarray(sliver), "PNG")), recipe, _LIMITS, keep_source=False)

    assert sample.geometry is not None
    assert sample.tensor[0].max() > 2
    assert 20_000 == pytest.approx(sample.geometry.scale_x * 111.5 + sample.geometry.offset_x)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_odd_metadata_neither_warns_nor_spoils_the_image(file_format: str) -> None:
    """Broken EXIF, over which Pillow warns, leaves the pixels as they are; no warning leaves the decoder."""
    broken = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x1a\x01\x05\0\xff\xff\0\0\xff\xff\xff\x00" * 2
    data = (
        _file(_ramp(), "JPEG", exif=broken)
        if file_format == "JPEG"
        else _file(_ramp(), "TIFF", tiffinfo={65_000: "x" * 9})
    )

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pixels = _decoded(data, 24, 17)

    assert [] == seen
    assert (17, 24, 3) == pixels.shape


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_senseless_orientation_counts_as_upright(orientation: int) -> None:
    """EXIF orientations that do not exist leave the picture as stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation

    np.testing.assert_array_equal(_decoded(_file(_ramp(), "PNG", exif=exif), 24, 17), np.asarray(_ramp()))


def _frame(pixel_format: PixelFormat, pixels: np.ndarray, width: int, pad: int = 0) -> RawFrame:
    height = pixels.shape[0]
    rows = pixels.reshape(height, -1).view(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, pad)), constant_values=77)
    # The last row's padding may be missing.
    data = padded.tobytes()[: padded.size - pad]
    return RawFrame(pixel_format=pixel_format, width=width, height=height, stride=padded.shape[1], data=data)


@pytest.mark.parametrize("pad", [0, 5])
def test_frames_are_read_row_by_row(pad: int) -> None:
    """RGB, BGR and mono frames give their pixels, with and without a gap between rows."""
    rgb = np.asarray(_ramp())
    gray = np.ascontiguousarray(rgb[..., 0])
    deep = gray.astype("<u2") * 257
    recipe = _pixel_recipe(17, 24)
    frames = {
        PixelFormat.RGB8: (rgb, rgb),
        PixelFormat.BGR8: (np.ascontiguousarray(rgb[..., ::-1]), rgb),
        PixelFormat.MONO8: (gray, np.repeat(gray[..., None], 3, axis=2)),
        PixelFormat.MONO16: (deep, np.repeat(gray[..., None], 3, axis=2)),
    }

    for pixel_format, (stored, expected) in frames.items():
        frame = _frame(pixel_format, stored, 24, pad)
        sample = decode(frame, recipe, _LIMITS, keep_source=True)

        assert 24 * 17 == measure(frame, _LIMITS)
        np.testing.assert_array_equal(np.moveaxis(sample.tensor, 0, -1), expected)
        np.testing.assert_array_equal(sample.source, expected)


@pytest.mark.parametrize(
    ("pixel_format", "red_row", "red_column"),
    [("bayer-rggb8", 0, 0), ("bayer-bggr8", 1, 1), ("bayer-grbg8", 0, 1), ("bayer-gbrg8", 1, 0)],
)
def test_bayer_frames_recover_even_colour(pixel_format: str, red_row: int, red_column: int) -> None:
    """Each pattern puts red, green and blue back where they belong, at the rim as well."""
    mosaic = np.full((7, 10), 100, np.uint8)
    mosaic[red_row::2, red_column::2] = 200
    mosaic[1 - red_row :: 2, 1 - red_column :: 2] = 50
    frame = _frame(PixelFormat(pixel_format), mosaic, 10)

    pixels = decode(frame, _pixel_recipe(7, 10), _LIMITS, keep_source=False).tensor

    assert {(200, 100, 50)} == {tuple(pixel) for pixel in pixels.reshape(3, -1).T.tolist()}


@pytest.mark.parametrize("pixel_format", [PixelFormat.MONO16, PixelFormat.BAYER_GRBG8])
def test_tall_frames_are_read_as_short_ones(pixel_format: PixelFormat) -> None:
    """A frame worked on in many bands of rows has, away from its rim, the pixels that a piece of it has."""
    stored = np.random.default_rng(4).integers(0, 255, (600, 501), dtype=np.uint8)
    stored = stored.astype("<u2") * 250 if pixel_format is PixelFormat.MONO16 else stored

    whole = decode(_frame(pixel_format, stored, 501), _pixel_recipe(600, 501), _LIMITS, keep_source=True)
    piece = decode(_frame(pixel_format, stored[250:280], 501), _pixel_recipe(30, 501), _LIMITS, keep_source=False)

    np.testing.assert_array_equal(whole.tensor[:, 251:279], piece.tensor[:, 1:29])
    np.testing.assert_array_equal(whole.source, np.moveaxis(whole.tensor, 0, -1))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_large_deep_pictures_are_read_as_small_ones(file_format: str) -> None:
    """Sixteen bits become eight in every band of rows, and the source kept is what the model sees."""
    values = np.random.default_rng(4).integers(0, 256, (600, 501)).astype(np.uint16) * 257
    payload = EncodedImage(data=_file(Image.fromarray(values), file_format))

    sample = decode(payload, _pixel_recipe(600, 501), _LIMITS, keep_source=True)

    np.testing.assert_array_equal(values // 257, sample.tensor[1])
    np.testing.assert_array_equal(np.moveaxis(sample.tensor, 0, -1), sample.source)


def test_bayer_interpolation_is_the_mean_of_neighbours() -> None:
    """Worked by hand: green at red is the mean of four, red between reds the mean of two or four."""
    mosaic = np.array([[10, 1, 30], [2, 90, 4], [50, 3, 70]], np.uint8)

    pixels = decode(_frame(PixelFormat.BAYER_RGGB8, mosaic, 3), _pixel_recipe(3, 3), _LIMITS, keep_source=False).tensor

    assert [[10, 20, 30], [30, 40, 50], [50, 60, 70]] == pixels[0].tolist()
    assert 3 == pixels[1, 1, 1]  # (1 + 2 + 3 + 4) / 4, rounded up.
    assert 90 == pixels[2, 1, 1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 0}, "at least 1 x 1"),
        ({"height": -3}, "at least 1 x 1"),
        ({"stride": 11}, "shorter than a row: 4 rgb8 pixels take 12"),
        ({"height": 5}, "needs 60 bytes, but 48 arrived"),
        ({"pixel_format": PixelFormat.BAYER_GBRG8, "width": 1, "stride": 1}, "at least 2 x 2"),
    ],
)
def test_frames_whose_sizes_disagree_are_refused(changes: dict[str, object], says: str) -> None:
    """The refusal names the sizes, at the door already."""
    fields = {"pixel_format": PixelFormat.RGB8, "width": 4, "height": 4, "stride": 12, "data": bytes(48)} | changes
    frame = RawFrame(**fields)  # type: ignore[arg-type]  # Built from the table above.

    with pytest.raises(InvalidRequest) as refusal:
        measure(frame, _LIMITS)

    assert says in refusal.value.message
    assert Reason.TENSOR_MISMATCH == refusal.value.reason


_TENSOR_RECIPE = InputRecipe(shape=(2, 3), channels="none")
_ONE_VALUE = InputRecipe(shape=(1,), channels="none")
_VALUES = np.array([[0, 1, 2], [3, 100, 255]])


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8", "u1"])
def test_tensors_arrive_unchanged(dtype: str) -> None:
    """Element types that float32 holds without loss are converted; values and shape stay."""
    tensor = TensorInput(dtype=np.dtype(dtype).name, shape=(2, 3), data=_VALUES.astype(dtype).tobytes())

    sample = decode(tensor, _TENSOR_RECIPE, _LIMITS, keep_source=True)

    assert _VALUES.tolist() == sample.tensor.tolist()
    assert np.float32 == sample.tensor.dtype
    assert sample.tensor.flags.c_contiguous
    assert sample.tensor.flags.writeable
    assert (None, None) == (sample.geometry, sample.source)


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    """Brain floats widen to the float32 of the same upper bits."""
    data = (np.array([1.0, -2.5], "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    recipe = InputRecipe(shape=(2,), channels="none")

    sample = decode(TensorInput(dtype="bfloat16", shape=(2,), data=data), recipe, _LIMITS, keep_source=False)

    assert [1.0, -2.5] == sample.tensor.tolist()


@pytest.mark.parametrize(
    ("tensor", "recipe", "says"),
    [
        (TensorInput(dtype="float32", shape=(3, 2), data=bytes(24)), _TENSOR_RECIPE, "takes float32 (2, 3)"),
        (TensorInput(dtype="float32", shape=(1, 2, 3), data=bytes(24)), _TENSOR_RECIPE, "without a batch dimension"),
        (TensorInput(dtype="float32", shape=(2, 3), data=bytes(23)), _TENSOR_RECIPE, "needs 24 bytes, but 23 arrived"),
        (TensorInput(dtype="int16", shape=(2, 3), data=bytes(12)), _TENSOR_RECIPE, "send one of float32"),
        (TensorInput(dtype="float32", shape=(2, -3), data=bytes(24)), _TENSOR_RECIPE, "has a size below 1"),
        (TensorInput(dtype="float64", shape=(1,), data=np.array([0.1]).tobytes()), _ONE_VALUE, "0.1"),
        (TensorInput(dtype="float64", shape=(1,), data=np.array([1e300]).tobytes()), _ONE_VALUE, "1e+300"),
        (
            TensorInput(dtype="float32", shape=(1,), data=np.array([0.5], "<f4").tobytes()),
            InputRecipe(shape=(1,), channels="none", dtype="uint8"),
            "cannot be held in uint8",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(tensor: TensorInput, recipe: InputRecipe, says: str) -> None:
    """Type, shape, bytes and precision are exact, and the message names what was expected."""
    error = _refusal(tensor, recipe)

    assert Reason.TENSOR_MISMATCH == error.reason
    assert says in error.message


@pytest.mark.parametrize("sizes", [(2**62,) * 60_000, (1,) * 33, (2**62,) * 32])
def test_absurd_shapes_are_refused_at_once(sizes: tuple[int, ...]) -> None:
    """Shapes of many axes or enormous sizes cost neither a long product nor a long message."""
    tensor = TensorInput(dtype="float32", shape=sizes, data=bytes(16))

    # Of this thread alone: a machine may stand still.
    started = time.thread_time()
    with pytest.raises(InvalidRequest) as refusal:
        measure(tensor, _LIMITS)
    error = _refusal(tensor, _TENSOR_RECIPE)

    assert {Reason.TENSOR_MISMATCH} == {refusal.value.reason, error.reason}
    assert max(len(text) for text in (refusal.value.message, error.message, error.metadata["shape"])) < 2_000
    assert time.thread_time() - started < 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8"])
def test_tensors_that_are_not_finite_are_refused(bad: float, dtype: str) -> None:
    """NaN and infinity are found and placed."""
    values = _VALUES.astype(dtype)
    values[1, 2] = bad

    error = _refusal(TensorInput(dtype=np.dtype(dtype).name, shape=(2, 3), data=values.tobytes()), _TENSOR_RECIPE)

    assert Reason.INPUT_NOT_FINITE == error.reason
    assert "the first at (1, 2)" in error.message


def test_images_for_a_tensor_model_are_refused() -> None:
    """A model without an image input says which tensor it takes."""
    error = _refusal(EncodedImage(data=_file(_ramp(), "PNG")), _TENSOR_RECIPE)

    assert "does not take images; send a tensor of float32 (2, 3)" in error.message


@pytest.mark.parametrize(
    "region", [Region(left=-1, top=0, width=4, height=4), Region(left=20, top=0, width=5, height=4)]
)
def test_regions_outside_the_source_are_refused(region: Region) -> None:
    """A region that leaves the source says where the source ends."""
    with pytest.raises(InvalidRequest, match="24 x 17"):
        decode(EncodedImage(data=_file(_ramp(), "PNG")), _pixel_recipe(4, 4), _LIMITS, keep_source=False, region=region)


def _seeds() -> list[bytes]:
    """Small real files of every format and several layouts."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    ramp = _ramp()
    return [
        *(_file(ramp, file_format) for file_format in _FORMATS),
        _file(ramp, "JPEG", progressive=True, exif=exif),
        _file(ramp.convert("CMYK"), "JPEG"),
        _file(ramp, "PNG", exif=exif),
        _file(ramp.quantize(7), "PNG", transparency=bytes([0, 9, 255])),
        _file(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160), "PNG"),
        _file(ramp, "WEBP", lossless=True, exif=exif),
        _file(ramp.convert("RGBA"), "WEBP"),
        _file(ramp.convert("1"), "BMP"),
        _file(ramp.quantize(7), "BMP"),
        *(
            _file(ramp, "TIFF", compression=name, exif=exif)
            for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ),
        _file(ramp.convert("1"), "TIFF", compression="group4"),
        _file(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160), "TIFF"),
    ]


_SEEDS = _seeds()
_RECIPES = (
    InputRecipe.imagenet(16, 20),
    InputRecipe(shape=(1, 9, 4), channels="gray", resize="letterbox"),
    InputRecipe(shape=(3, 2, 2), interpolation="bicubic"),
)


def _survives(data: bytes, recipe: InputRecipe, *, keep_source: bool) -> None:
    try:
        sample = decode(EncodedImage(data=data), recipe, DecodeLimits(max_pixels=1_000_000), keep_source=keep_source)
    except CamserveError as error:
        assert error.reason in (Reason.IMAGE_UNDECODABLE, Reason.IMAGE_TOO_LARGE)  # noqa: PT017  Either end is right.
    else:
        assert recipe.shape == sample.tensor.shape
        assert np.isfinite(sample.tensor).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.sampled_from(_SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    stop=st.one_of(st.just(1.0), st.floats(0, 1)),
    recipe=st.sampled_from(_RECIPES),
    keep_source=st.booleans(),
)
def test_mutated_files_are_decoded_or_refused(
    seed: bytes, changes: list[tuple[float, int]], stop: float, recipe: InputRecipe, *, keep_source: bool
) -> None:
    """Real files with bytes changed and ends cut off give a sample or a refusal, never another exception or a warning."""
    data = bytearray(seed)
    for place, value in changes:
        # Headers break decoders more than pixels do: half of the changes go to the first 64 bytes.
        data[int(place * 2 * min(64, len(data))) if place < 0.5 else int(place * len(data))] = value
    _survives(bytes(data[: round(stop * len(data))]), recipe, keep_source=keep_source)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    magic=st.sampled_from(
        [
            b"",
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"RIFF\0\0\0\0WEBPVP8X",
            b"BM",
            b"II*\0",
            b"MM\0*",
            b"II+\0\x08\0\0\0",
        ]
    ),
    rest=st.binary(max_size=200),
)
def test_any_bytes_are_decoded_or_refused(magic: bytes, rest: bytes) -> None:
    """Bytes that only begin like an image give a refusal."""
    _survives(magic + rest, _RECIPES[0], keep_source=True)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(
    seed=st.sampled_from(_SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=20),
    stop=st.one_of(st.just(1.0), st.floats(0, 1)),
    recipe=st.sampled_from(_RECIPES),
)
def test_many_mutated_files_are_decoded_or_refused(
    seed: bytes, changes: list[tuple[float, int]], stop: float, recipe: InputRecipe
) -> None:
    """The same, longer and with fresh randomness."""
    data = bytearray(seed)
    for place, value in changes:
        data[int(place * len(data))] = value
    _survives(bytes(data[: round(stop * len(data))]), recipe, keep_source=False)

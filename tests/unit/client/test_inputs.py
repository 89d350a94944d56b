from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from camserve.client import InvalidInput, TensorInput
from camserve.client.inputs import prepare
from camserve.v1 import input_pb2


def test_files_and_bytes_travel_as_they_are(tmp_path: Path, png: bytes) -> None:
    """The server decodes; nothing is re-encoded on the way."""
    path = tmp_path / "part.png"
    path.write_bytes(png)

    for image in (path, str(path), png, bytearray(png), memoryview(png)):
        assert input_pb2.EncodedImage(data=png) == prepare(image).message
    assert str(path) == prepare(path).name


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_pil_images_travel_without_loss(mode: str) -> None:
    """As PNG, or as RGB in one where PNG has no such mode."""
    image = Image.new("RGB", (3, 2), (10, 200, 30)).convert("L" if mode == "I;16" else mode)
    image = Image.fromarray(np.full((2, 3), 40_000, np.uint16)) if mode == "I;16" else image

    message = prepare(image).message

    assert isinstance(message, input_pb2.EncodedImage)
    with Image.open(io.BytesIO(message.data)) as sent:
        expected = image.convert("RGB") if mode == "CMYK" else image
        assert np.asarray(expected).tolist() == np.asarray(sent).tolist()


def test_the_orientation_of_a_pil_image_is_applied_before_it_is_sent() -> None:
    """PNG made by Pillow would lose the tag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, "JPEG", exif=exif)

    with Image.open(file) as turned:
        message = prepare(turned).message

    assert isinstance(message, input_pb2.EncodedImage)
    assert (4, 6) == Image.open(io.BytesIO(message.data)).size


@pytest.mark.parametrize(
    ("array", "pixel_format", "data"),
    [
        (np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), "PIXEL_FORMAT_RGB8", bytes([1, 2, 3, 4, 5, 6])),
        (np.array([[1, 2], [3, 4]], np.uint8)[:, ::-1], "PIXEL_FORMAT_MONO8", bytes([2, 1, 4, 3])),
        (np.array([[1, 258]], ">u2"), "PIXEL_FORMAT_MONO16", bytes([1, 0, 2, 1])),
    ],
    ids=["colour", "gray, not contiguous", "16 bit, big-endian"],
)
def test_arrays_travel_as_raw_frames(array: npt.NDArray[np.uint8], pixel_format: str, data: bytes) -> None:
    """Rows without gap, little-endian, whatever the array's layout."""
    expected = input_pb2.RawFrame(
        pixel_format=pixel_format, width_pixels=array.shape[1], height_pixels=array.shape[0], data=data
    )

    assert expected == prepare(array).message


def test_tensors_travel_exactly() -> None:
    """Shape, type and little-endian elements in C order; there is no picture of them."""
    prepared = prepare(TensorInput(np.array([[1.0, -2.0]], ">f4").T))

    assert input_pb2.Tensor(
        data_type="DATA_TYPE_FLOAT32", shape=[2, 1], data=bytes.fromhex("0000803f000000c0")
    ) == prepared.message  # fmt: skip
    assert prepared.picture is None


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4), np.uint8),
        TensorInput(np.zeros(3, np.int64)),
        Image.new("F", (2, 2)),
        Image.fromarray(np.full((2, 2), 70_000, np.int32)),
        b"",
        "/nowhere/part.png",
    ],
    ids=["float", "four channels", "no rows", "int64", "mode F", "mode I too large", "empty", "no file"],
)
def test_what_cannot_be_sent_is_refused_before_it_is_sent(image: object) -> None:
    """As an InvalidInput, which is a ValueError, too."""
    with pytest.raises(InvalidInput) as raised:
        prepare(image)  # type: ignore[arg-type]

    assert isinstance(raised.value, ValueError)
    assert raised.value.reason in {"INPUT_UNREADABLE", "INPUT_UNSUPPORTED"}


def test_other_types_are_refused_with_what_is_allowed() -> None:
    """A list might be anything."""
    with pytest.raises(TypeError, match="cannot explain a list; give a path"):
        prepare([1])  # type: ignore[arg-type]


def test_the_picture_of_a_pil_image_is_what_was_sent() -> None:
    """Drawing on the original afterwards does not change the overlay."""
    image = Image.new("L", (2, 1), 5)
    prepared = prepare(image)
    image.putpixel((0, 0), 200)

    assert prepared.picture is not None
    assert 5 == prepared.picture().getpixel((0, 0))

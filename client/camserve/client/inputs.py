"""What a caller wants explained becomes the `input` of a request: a path, bytes, a PIL image, an array or a `TensorInput`.

`prepare` reads and checks; `requests.py` puts what it returns into the message. The picture is remembered, so that overlays need
not be given it again, but decoded only when somebody asks for it.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from camserve.client import words
from camserve.client.errors import InvalidInput
from camserve.v1 import explanation_service_pb2, input_pb2


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TensorInput:
    """Exactly the model's input for one row; nothing is resized or normalised.

    Attributes:
        array: float32, float16, float64 or uint8, without the batch dimension: (c, h, w) for image models.
    """

    array: npt.ArrayLike


AnyInput: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any] | TensorInput
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedInput:
    """An input ready to be sent.

    Attributes:
        name: where it came from: a path, or such as "bytes".
        message: what goes into the request.
        picture: opens the source as the server sees it, EXIF orientation applied; None for tensors.
    """

    name: str
    message: input_pb2.EncodedImage | input_pb2.RawFrame | input_pb2.Tensor
    picture: Callable[[], Image.Image] | None

    def put_into(self, request: explanation_service_pb2.ExplainRequest) -> None:
        """Sets the request's `input`."""
        match self.message:
            case input_pb2.EncodedImage():
                request.image.CopyFrom(self.message)
            case input_pb2.RawFrame():
                request.frame.CopyFrom(self.message)
            case input_pb2.Tensor():
                request.tensor.CopyFrom(self.message)


def prepare(image: AnyInput) -> PreparedInput:
    """Reads and checks one input.

    Args:
        image: path of an image file; the bytes of one; a PIL image, sent as lossless PNG; an array (h, w, 3) uint8 red green
            blue, (h, w) uint8 gray or (h, w) uint16 gray; or a TensorInput.

    Raises:
        InvalidInput: when the file cannot be read or the array has another form.
        TypeError: for anything else.
    """
    match image:
        case PreparedInput():
            return image
        case str() | os.PathLike():
            return _from_path(Path(image))
        case bytes() | bytearray() | memoryview():
            return _from_bytes(bytes(image), "bytes")
        case Image.Image():
            return _from_picture(image)
        case np.ndarray():
            return _from_array(image)
        case TensorInput():
            return PreparedInput(name="tensor", message=to_tensor(image), picture=None)
    raise TypeError(
        f"cannot explain a {type(image).__name__}; give a path, bytes, a PIL image, an array (h, w[, 3]) or a TensorInput"
    )


def to_tensor(tensor: TensorInput) -> input_pb2.Tensor:
    """Returns the wire form of a tensor: elements in C order, little-endian; raises InvalidInput for other dtypes."""
    array = np.asarray(tensor.array)
    if array.dtype.name not in {"float32", "float16", "float64", "uint8"}:
        raise _unsupported(
            f"a tensor of {array.dtype.name} cannot be sent; convert it to float32, float16, float64 or uint8"
        )
    little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return input_pb2.Tensor(
        data_type=words.DATA_TYPES.name(array.dtype.name), shape=array.shape, data=little_endian.tobytes()
    )


def _from_path(path: Path) -> PreparedInput:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput("INVALID_ARGUMENT", "INPUT_UNREADABLE", f"cannot read {path}: {error.strerror}") from error
    return _from_bytes(data, str(path))


def _from_bytes(data: bytes, name: str) -> PreparedInput:
    if not data:
        raise InvalidInput("INVALID_ARGUMENT", "INPUT_UNREADABLE", f"{name} is empty")

    def picture() -> Image.Image:
        try:
            return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways of saying that a file is broken.
            raise InvalidInput("INVALID_ARGUMENT", "INPUT_UNREADABLE", f"{name} cannot be shown: {error}") from error

    return PreparedInput(name=name, message=input_pb2.EncodedImage(data=data), picture=picture)


def _from_picture(image: Image.Image) -> PreparedInput:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in {"CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La", "PA"}:
        upright = upright.convert("RGBA" if upright.mode in {"RGBa", "La", "PA"} else "RGB")
    if upright.mode == "F" or (upright.mode == "I" and not _fits_16_bits(upright)):
        raise _unsupported(f"a PIL image of mode {upright.mode} does not fit a PNG; convert it to RGB, L or I;16")
    file = io.BytesIO()
    upright.save(file, "PNG", compress_level=1)  # It travels once; smaller is not worth the time.
    sent = upright.copy()  # The caller may draw on theirs before the overlay is asked for.
    message = input_pb2.EncodedImage(data=file.getvalue())
    return PreparedInput(name=getattr(image, "filename", "") or "picture", message=message, picture=lambda: sent)


def _fits_16_bits(image: Image.Image) -> bool:
    low, high = np.asarray(image).min(), np.asarray(image).max()
    return bool(low >= 0 and high <= 65535)


_FORMATS: Final = {
    (3, "uint8"): "PIXEL_FORMAT_RGB8",
    (2, "uint8"): "PIXEL_FORMAT_MONO8",
    (2, "uint16"): "PIXEL_FORMAT_MONO16",
}


def _from_array(array: npt.NDArray[Any]) -> PreparedInput:
    pixel_format = _FORMATS.get((array.ndim, array.dtype.name))
    if pixel_format is None or 0 in array.shape or (array.ndim == 3 and array.shape[2] != 3):
        raise _unsupported(
            f"an array {array.shape} of {array.dtype.name} is no picture; give (h, w, 3) uint8, (h, w) uint8 or (h, w) uint16, "
            "or wrap the model's own input in TensorInput"
        )
    # tobytes copies, so a camera buffer may be written to again as soon as the call has begun.
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    height, width = array.shape[:2]

    def picture() -> Image.Image:
        pixels = np.frombuffer(data, array.dtype.newbyteorder("<")).reshape(array.shape)
        return Image.fromarray(pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8))

    message = input_pb2.RawFrame(pixel_format=pixel_format, width_pixels=width, height_pixels=height, data=data)
    return PreparedInput(name="array", message=message, picture=picture)


def _unsupported(message: str) -> InvalidInput:
    return InvalidInput("INVALID_ARGUMENT", "INPUT_UNSUPPORTED", message)

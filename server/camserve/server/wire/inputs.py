"""Images, frames, tensors and boxes of a request to what `jobs` calls them; their bytes are not looked at. For `requests.py`."""

from __future__ import annotations

from camserve.server import jobs
from camserve.server.wire import words
from camserve.server.wire.fields import at_least, invalid
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import input_pb2

__all__ = ["read_box", "read_payload", "read_tensor"]


def read_payload(request: service_pb2.ExplainRequest) -> jobs.JobInput:
    """What is to be looked at.

    Raises:
        InvalidRequest: there is none, or a field of it is missing or wrong.
    """
    match request.WhichOneof("input"):
        case "image":
            return jobs.EncodedImage(data=request.image.data)
        case "frame":
            return _frame(request.frame)
        case "tensor":
            return read_tensor(request.tensor, "tensor")
        case _:
            raise invalid("input", "is required; send image, frame or tensor")


def read_tensor(tensor: input_pb2.Tensor, field: str) -> jobs.TensorInput:
    """A tensor as it came.

    Raises:
        InvalidRequest: its element type is unset or unknown.
    """
    return jobs.TensorInput(
        dtype=words.word(words.DATA_TYPES, tensor.data_type, f"{field}.data_type"),
        shape=tuple(tensor.shape),
        data=tensor.data,
    )


def read_box(box: input_pb2.Box, field: str) -> jobs.Box:
    """A rectangle of the source; where the source ends is not known yet.

    Raises:
        InvalidRequest: a side is below 1.
    """
    return jobs.Box(
        left=box.left_pixels,
        top=box.top_pixels,
        width=at_least(1, box.width_pixels, f"{field}.width_pixels"),
        height=at_least(1, box.height_pixels, f"{field}.height_pixels"),
    )


def _frame(frame: input_pb2.RawFrame) -> jobs.RawFrame:
    pixel_format = words.word(words.PIXEL_FORMATS, frame.pixel_format, "frame.pixel_format")
    bytes_a_pixel = {jobs.PixelFormat.MONO16: 2, jobs.PixelFormat.RGB8: 3, jobs.PixelFormat.BGR8: 3}.get(
        pixel_format, 1
    )
    width = at_least(1, frame.width_pixels, "frame.width_pixels")
    height = at_least(1, frame.height_pixels, "frame.height_pixels")
    row = width * bytes_a_pixel
    stride = frame.stride_bytes if frame.HasField("stride_bytes") else row
    if stride < row:
        raise invalid("frame.stride_bytes", f"is {stride}, but a row alone takes {row} bytes")
    return jobs.RawFrame(pixel_format=pixel_format, width=width, height=height, stride=stride, data=frame.data)

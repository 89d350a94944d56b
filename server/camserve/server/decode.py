"""The decode stage: an undecoded payload arrives, a `Sample` leaves: the model's exact input and where it lies on the source.

The door calls `measure` on the event loop, which looks at headers only; `pipeline.py` calls `decode` in a thread pool. Both take
whatever bytes a caller sends and raise nothing but `CamserveError`.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
from PIL import Image

from camserve.server.bands import bands
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.frame import check_frame, read_frame
from camserve.server.image_file import ImageFileError, Mode, Pixels, load_pixels
from camserve.server.image_header import Header, HeaderError, ImageFormat, read_header
from camserve.server.jobs import ByteArray, EncodedImage, JobInput, RawFrame, Sample, TensorInput
from camserve.server.models.recipe import InputRecipe
from camserve.server.preprocess import geometry, place, sample
from camserve.server.tensors import check_tensor, read_tensor

__all__ = ["DecodeLimits", "Region", "decode", "may_reduce", "measure"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """What an input may be at most.

    Attributes:
        max_pixels: of an image or frame; for a tensor, elements of one channel. `footprint.py` says what decoding takes.
        max_bytes: of the payload as it arrived.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A rectangle of the upright source, in pixels; only it is shown to the model.

    Attributes:
        left: first column.
        top: first row.
        width: columns.
        height: rows.
    """

    left: int
    top: int
    width: int
    height: int


def measure(payload: JobInput, limits: DecodeLimits) -> int:
    """Counts pixels without decoding any.

    Returns:
        Pixels of an image or frame, and of a tile of the image's file; elements of one channel of a tensor: what decoding will
        cost is proportional to it.

    Raises:
        InvalidRequest: IMAGE_TOO_LARGE; IMAGE_UNDECODABLE for what is not one still image of a format we take; TENSOR_MISMATCH
            for frames and tensors whose sizes and bytes do not agree.
    """
    return _examined(payload, limits)[0]


def _examined(payload: JobInput, limits: DecodeLimits) -> tuple[int, Header | None]:
    """What `measure` gives, and the header of a file, lest it be read twice."""
    if len(payload.data) > limits.max_bytes:
        raise InvalidRequest(
            Reason.IMAGE_TOO_LARGE,
            f"input of {len(payload.data)} bytes is over the limit of {limits.max_bytes}; send it smaller",
            metadata={"bytes": len(payload.data), "maxBytes": limits.max_bytes},
        )
    if isinstance(payload, EncodedImage):
        header = _header(payload)
        return _within(header.width, header.height, limits) + _within(*header.tile, limits), header
    if isinstance(payload, RawFrame):
        check_frame(payload)
        return _within(payload.width, payload.height, limits), None
    elements = check_tensor(payload)
    return _within(elements // (payload.shape or (1,))[0], 1, limits), None


def decode(
    payload: JobInput, recipe: InputRecipe, limits: DecodeLimits, *, keep_source: bool, region: Region | None = None
) -> Sample:
    """Makes the model's input.

    JPEG files much larger than the input are decoded at reduced size; the geometry still refers to the full one. What the model
    sees does not depend on `keep_source`.

    Args:
        payload: what the caller sent.
        recipe: the model's.
        limits: checked again, so that decoding is safe without the door.
        keep_source: whether to keep the source's pixels, for overlays; ignored for tensors, which have none.
        region: the part of the source to show to the model; None shows all.

    Raises:
        InvalidRequest: as `measure`; also IMAGE_UNDECODABLE for truncated and corrupt files, TENSOR_MISMATCH and
            INPUT_NOT_FINITE for tensors, FIELD_INVALID for a region that is empty or outside the source. It carries neither cause
            nor frames: they would keep the picture alive for as long as anybody holds the error.
    """
    try:
        return _decode(payload, recipe, limits, keep_source=keep_source, region=region)
    except InvalidRequest as error:
        error.__context__ = None
        raise error.with_traceback(None) from None


def _decode(
    payload: JobInput, recipe: InputRecipe, limits: DecodeLimits, *, keep_source: bool, region: Region | None
) -> Sample:
    started = time.perf_counter()
    _, header = _examined(payload, limits)
    if isinstance(payload, TensorInput):
        if region is not None:
            raise InvalidRequest(
                Reason.FIELD_INVALID, "a tensor is the model's whole input; leave the region of interest out"
            )
        tensor = read_tensor(payload, recipe, is_variable=recipe.is_variable)
        return Sample(tensor=tensor, geometry=None, decode_seconds=time.perf_counter() - started)
    if not recipe.takes_images:
        raise InvalidRequest(
            Reason.TENSOR_MISMATCH,
            f"this model does not take images; send a tensor of {recipe.dtype} {recipe.shape}",
            metadata={"dtype": recipe.dtype, "shape": recipe.shape},
        )
    pixels, source = _pixels(payload, header, recipe, keep_source=keep_source, is_whole=region is None)
    whole = Region(left=0, top=0, width=pixels.width, height=pixels.height)
    shown = whole if region is None else _checked(region, whole)
    image, box = pixels.image, pixels.box
    if shown != whole:
        # A copy, so that resizing cannot look past the region's edges.
        crop = np.asarray(image)[shown.top : shown.top + shown.height, shown.left : shown.left + shown.width]
        image, box = Image.fromarray(np.ascontiguousarray(crop)), (0.0, 0.0, float(shown.width), float(shown.height))
    recipe = recipe.for_source(shown.width, shown.height)
    placement = place(recipe, shown.width, shown.height)
    lies = geometry(placement, recipe, shown.width, shown.height)
    return Sample(
        tensor=sample(image, box, placement, recipe),
        geometry=dataclasses.replace(
            lies,
            source_width=whole.width,
            source_height=whole.height,
            offset_x=lies.offset_x + shown.left,
            offset_y=lies.offset_y + shown.top,
        ),
        source=source,
        decode_seconds=time.perf_counter() - started,
    )


def _pixels(
    payload: EncodedImage | RawFrame, header: Header | None, recipe: InputRecipe, *, keep_source: bool, is_whole: bool
) -> tuple[Pixels, ByteArray | None]:
    """The source's pixels, in the recipe's mode or gray, and, if asked, as (h w 3) uint8."""
    mode: Mode = "L" if recipe.channels == "gray" else "RGB"
    if isinstance(payload, RawFrame):
        frame = read_frame(payload)
        image = Image.fromarray(frame)
        box = (0.0, 0.0, float(image.width), float(image.height))
        image = image if image.mode in (mode, "L") else image.convert(mode)
        source = (frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, axis=2)) if keep_source else None
        return Pixels(image=image, width=image.width, height=image.height, box=box), source
    header = header or _header(payload)
    least = _least(header, recipe) if is_whole else None
    try:
        if not keep_source:
            return load_pixels(payload.data, header, mode=mode, least=least), None
        full = load_pixels(payload.data, header, mode="RGB")
        source = _as_array(full.image)
        if least is not None:
            # Twice the work for large JPEGs with an overlay, lest the prediction depend on whether one was asked for.
            del full
            return load_pixels(payload.data, header, mode=mode, least=least), source
        is_ready = full.image.mode in (mode, "L")
        return full if is_ready else dataclasses.replace(full, image=full.image.convert(mode)), source
    except ImageFileError as error:
        raise _undecodable(payload, str(error)) from error


def _as_array(image: Image.Image) -> ByteArray:
    """An RGB or gray picture as (h w 3); numpy's own way takes three copies."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for band in bands(image.height, 3 * image.width):
        part = np.asarray(image.crop((0, band.start, image.width, band.stop)))
        pixels[band] = part if part.ndim == 3 else part[..., None]
    return pixels


def may_reduce(header: Header, recipe: InputRecipe) -> bool:
    """Whether a file shown whole is decoded at half its width and height or less."""
    return recipe.takes_images and _least(header, recipe) is not None


def _least(header: Header, recipe: InputRecipe) -> tuple[int, int] | None:
    """The size, upright, that resizing will reach; None without a reduced size of at least twice that."""
    if header.format is not ImageFormat.JPEG:
        return None
    width, height = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
    placement = place(recipe.for_source(width, height), width, height)
    return (placement.width, placement.height) if min(width / placement.width, height / placement.height) >= 4 else None


def _checked(region: Region, whole: Region) -> Region:
    inside = region.left >= 0 and region.top >= 0 and region.width >= 1 and region.height >= 1
    if not (inside and region.left + region.width <= whole.width and region.top + region.height <= whole.height):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"region of {region.width} x {region.height} pixels at column {region.left}, row {region.top} does not lie within "
            f"the upright source of {whole.width} x {whole.height} pixels",
        )
    return region


def _header(payload: EncodedImage) -> Header:
    try:
        return read_header(payload.data)
    except HeaderError as error:
        raise _undecodable(payload, str(error)) from error


def _undecodable(payload: EncodedImage, why: str) -> InvalidRequest:
    formats = ", ".join(ImageFormat)
    return InvalidRequest(
        Reason.IMAGE_UNDECODABLE,
        f"image cannot be decoded: {why}; send one whole still image as {formats}",
        metadata={"why": why, "formats": formats, "bytes": len(payload.data)},
    )


def _within(width: int, height: int, limits: DecodeLimits) -> int:
    pixels = width * height
    if pixels > limits.max_pixels:
        raise InvalidRequest(
            Reason.IMAGE_TOO_LARGE,
            f"input of {width} x {height} pixels is over the limit of {limits.max_pixels}; send it smaller",
            metadata={"width": width, "height": height, "maxPixels": limits.max_pixels},
        )
    return pixels

"""The encode stage: a `RawMap` arrives from the engine, the `Heatmap` that is sent leaves.

`pipeline.py` calls it once for each map, in the thread pool, or at once where `is_quickly_encoded` says that the way there would
take longer; numpy and Pillow only.
The contract is `Heatmap` in heatmap.proto. The same map gives the same bytes every time: payloads are hashed into the audit
record and compared by tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import time
import zlib
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from camserve.server.bands import bands
from camserve.server.errors import ExecutionFailed, InvalidRequest, Reason, Unsupported
from camserve.server.jobs import ByteArray, Compression, Encoding, FloatArray, Geometry, Heatmap, MapSize, RawMap, Spec
from camserve.server.overlay import blend
from camserve.server.placement import box_on_source
from camserve.server.regions import find_regions
from camserve.server.resize import map_geometry, onto_source, to_size

__all__ = ["encode", "is_quickly_encoded", "needs_source"]

# By the number of axes of space.
_AXES: Final = {1: ("t",), 2: ("h", "w"), 3: ("d", "h", "w")}
_CELLS: Final = frozenset({Encoding.FLOAT32, Encoding.FLOAT16, Encoding.UINT8})
# File format, the largest side it can hold, and how it is saved: on photographs more effort costs far more than it gains.
_OVERLAYS: Final[dict[Encoding, tuple[str, int, dict[str, int]]]] = {
    Encoding.OVERLAY_PNG: ("PNG", 2**31 - 1, {"compress_level": 1}),
    Encoding.OVERLAY_JPEG: ("JPEG", 65_500, {"quality": 90}),
    Encoding.OVERLAY_WEBP: ("WEBP", 16_383, {"quality": 85, "method": 2}),
}
# zlib's default is worth its time only while the payload is small.
_SMALL_BYTES: Final = 65_536
# So many cells take 0.05 to 0.15 ms, whatever type they are sent as; `intake.py` tells what the way to a worker takes.
_QUICK_CELLS: Final = 1024

_Code = TypeVar("_Code", np.uint8, np.uint16)


def needs_source(spec: Spec) -> bool:
    """Whether the spec's heatmap is drawn on the source's pixels, so that decode must keep them."""
    return spec.encoding in _OVERLAYS


def is_quickly_encoded(raw: RawMap, spec: Spec) -> bool:
    """Whether `encode` may run on the event loop: a few cells, sent as they are."""
    return (
        raw.values.size <= _QUICK_CELLS
        and spec.size is MapSize.LAYER
        and spec.encoding in _CELLS
        and spec.regions is None
    )


def encode(
    raw: RawMap,
    spec: Spec,
    *,
    label: str,
    geometry: Geometry | None,
    source: ByteArray | None = None,
    input_size: tuple[int, int] | None = None,
) -> Heatmap:
    """Encodes one map as its spec asks.

    Args:
        raw: the map, finite.
        spec: size, encoding, opacity.
        label: of the class it is about; left out where it is about none.
        geometry: how the model's input lies on the source; None for tensors.
        source: (h w 3) uint8, upright; for overlays.
        input_size: (height, width) of the model's input, for MapSize.INPUT where there is no geometry.

    Raises:
        InvalidRequest: the source's size, or an overlay, for an input without a source image.
        Unsupported: a 1D or 3D map, or one with channels, in another form than its own cells or with regions; an overlay larger
            than its file format allows.
        ExecutionFailed: float16 cannot hold the values, or the map is not finite.
    """
    started = time.perf_counter()
    if not np.isfinite(raw.values).all():
        raise ExecutionFailed(Reason.INTERNAL, f"map of {raw.values.shape} cells is not finite")
    _check_form(raw, spec)
    axes = (*_AXES[_rank(raw)], "c") if raw.has_channels else _AXES[_rank(raw)]
    regions = () if spec.regions is None else find_regions(raw.values, spec.regions, geometry)
    values, lies = _sized(raw, spec, geometry, input_size)
    shape: tuple[int, ...] = values.shape
    low, high = float(values.min()), float(values.max())
    if spec.encoding in _OVERLAYS:
        codes = _codes(values, low, high, np.uint8)
        # Of a picture of many megapixels each of these is large.
        del values
        payload = _overlay(codes, spec, source)
        axes, shape = ("h", "w", "c"), (*shape, 3)
    elif spec.encoding is Encoding.FLOAT32:
        payload = _little_endian(values)
        del values
    elif spec.encoding is Encoding.FLOAT16:
        halves = _to_half(values, low, high)
        low, high = float(halves.min()), float(halves.max())
        payload = halves.tobytes()
    elif spec.encoding is Encoding.PNG16:
        payload = _png(_codes(values, low, high, np.uint16))
    else:
        codes = _codes(values, low, high, np.uint8)
        del values
        payload = codes.tobytes() if spec.encoding is Encoding.UINT8 else _png(codes)
    may_compress = spec.may_compress and spec.encoding in _CELLS
    sent, compression = _compressed(payload) if may_compress else (payload, Compression.NONE)
    return Heatmap(
        raw=_on_source(raw, geometry),
        label="" if raw.target.class_index is None else label,
        method=spec.method,
        profile=spec.profile,
        shape=shape,
        axes=axes,
        encoding=spec.encoding,
        compression=compression,
        payload=sent,
        value_min=low,
        value_max=high,
        geometry=lies,
        raw_sha256=hashlib.sha256(_little_endian(raw.values)).digest(),
        payload_sha256=hashlib.sha256(payload).digest(),
        encode_seconds=time.perf_counter() - started,
        regions=regions,
    )


def _rank(raw: RawMap) -> int:
    """How many axes of space the map has."""
    return raw.values.ndim - raw.has_channels


def _check_form(raw: RawMap, spec: Spec) -> None:
    """Refuses what only a plain picture has: other sizes than its own, files, regions."""
    if _rank(raw) == 2 and not raw.has_channels:
        return
    size = MapSize.SOURCE if spec.encoding in _OVERLAYS else spec.size
    told = f"a map of {_rank(raw)} dimensions{' with channels' if raw.has_channels else ''}"
    metadata = {"dimensions": _rank(raw), "hasChannels": raw.has_channels, "encoding": spec.encoding, "size": size}
    if _rank(raw) not in _AXES or size is not MapSize.LAYER or spec.encoding not in _CELLS:
        raise Unsupported(
            Reason.FEATURE_NOT_IMPLEMENTED,
            f"{told} cannot be sent as {spec.encoding} at {size} size; maps of 1 or 3 dimensions, and signed channels, go at "
            "layer size as float32, float16 or uint8",
            metadata=metadata,
        )
    if spec.regions is not None:
        raise Unsupported(
            Reason.FEATURE_NOT_IMPLEMENTED,
            f"{told} has no regions: they are boxes in a picture; leave them out and threshold the map",
            metadata=metadata,
        )


def _on_source(raw: RawMap, geometry: Geometry | None) -> RawMap:
    """The map with the box of the detection it is about on the source, as every box is that leaves the house."""
    if raw.target.box is None:
        return raw
    box = box_on_source(raw.target.box, geometry)
    return dataclasses.replace(raw, target=dataclasses.replace(raw.target, box=box))


def _sized(
    raw: RawMap, spec: Spec, geometry: Geometry | None, input_size: tuple[int, int] | None
) -> tuple[FloatArray, Geometry | None]:
    """The map at the size asked for, and how its cells lie on the source."""
    values, size = raw.values, MapSize.SOURCE if spec.encoding in _OVERLAYS else spec.size
    if _rank(raw) != 2:
        return values, None
    if size is MapSize.LAYER:
        return values, None if geometry is None else map_geometry(geometry, *values.shape[:2])
    if size is MapSize.INPUT:
        target = input_size if geometry is None else (geometry.input_height, geometry.input_width)
        if target is None:
            raise _needs_image(spec.encoding, size, "the model's input has no height and width")
        return to_size(values, *target), geometry
    if geometry is None:
        raise _needs_image(spec.encoding, size, "a tensor has no source image")
    drawn = onto_source(values, map_geometry(geometry, *values.shape))
    return drawn, Geometry(
        source_width=geometry.source_width,
        source_height=geometry.source_height,
        input_width=geometry.source_width,
        input_height=geometry.source_height,
    )


def _needs_image(encoding: Encoding, size: MapSize, why: str) -> InvalidRequest:
    return InvalidRequest(
        Reason.FIELD_INVALID,
        f"{encoding} at {size} size needs an image: {why}; ask for layer size as float32, float16, uint8, png8 or "
        "png16, or send an image",
        metadata={"encoding": encoding, "size": size},
    )


def _little_endian(values: FloatArray) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _codes(values: FloatArray, low: float, high: float, kind: type[_Code]) -> npt.NDArray[_Code]:
    """Codes from 0 to the type's largest, linear from low to high, to the nearest; all 0 for a constant map."""
    result = np.empty(values.size, kind)
    flat = values.reshape(-1)
    for band in bands(values.size):
        # float64: in float32 the 65535 steps of PNG16 would already be off by more than rounding.
        codes = flat[band].astype(np.float64)
        codes -= low
        if high > low:
            codes *= np.iinfo(kind).max / (high - low)
        result[band] = np.rint(codes, out=codes)
    return result.reshape(values.shape)


def _to_half(values: FloatArray, low: float, high: float) -> npt.NDArray[np.float16]:
    """Rounds to float16; refuses what would be lost: beyond its range, or so small that uint8 would be finer."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    pairs = ((halves.reshape(-1)[band], values.reshape(-1)[band]) for band in bands(values.size))
    # np.max rather than max, which would lose a NaN.
    error = float(np.max([np.abs(half.astype(np.float64) - value).max() for half, value in pairs]))
    if not error <= max((high - low) / 510, max(abs(low), abs(high)) / 2048 if high == low else 0.0):
        raise ExecutionFailed(
            Reason.FIELD_INVALID,
            f"float16 cannot hold this map: its values from {low:.6g} to {high:.6g} would be off by up to {error:.3g}; "
            "ask for float32 or uint8",
            metadata={"valueMin": low, "valueMax": high},
        )
    return halves


def _png(codes: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(codes).save(file, "PNG", compress_level=6 if codes.nbytes <= _SMALL_BYTES else 1)
    return file.getvalue()


def _overlay(codes: ByteArray, spec: Spec, source: ByteArray | None) -> bytes:
    file_format, largest_side, options = _OVERLAYS[spec.encoding]
    if source is None or source.shape != (*codes.shape, 3):
        raise ExecutionFailed(Reason.INTERNAL, f"the source's pixels were not kept for {spec.encoding}")
    if max(codes.shape) > largest_side:
        raise Unsupported(
            Reason.FEATURE_NOT_IMPLEMENTED,
            f"a {file_format} file has at most {largest_side} pixels a side, the source {max(codes.shape)}; ask for overlay-png",
            metadata={"encoding": spec.encoding, "largestSide": largest_side},
        )
    height, width = codes.shape
    image = Image.new("RGB", (width, height))
    for band in bands(height, 3 * width):
        image.paste(Image.fromarray(blend(source[band], codes[band], spec.overlay_opacity)), (0, band.start))
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _compressed(payload: bytes) -> tuple[bytes, Compression]:
    packed = zlib.compress(payload, 6 if len(payload) <= _SMALL_BYTES else 1)
    return (packed, Compression.ZLIB) if len(packed) < len(payload) else (payload, Compression.NONE)

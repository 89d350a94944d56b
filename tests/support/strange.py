"""Requests as no client writes them: hypothesis strategies over every message of the contract, and over the bytes of pictures.

A case is mostly a sound request in which a few fields, anywhere, got another value, for only that comes far; the rest is drawn
field by field, or as bytes that may be no message at all. `tests/e2e/test_fuzz.py` sends them.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from google.protobuf import descriptor as descriptors
from google.protobuf.message import Message
from hypothesis import strategies as st
from PIL import Image

from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import input_pb2, model_service_pb2, spec_pb2

__all__ = ["MODELS", "PIXELS", "SIDE", "SPARE", "Case", "cases", "picture_cases"]

SIDE = 32
PIXELS = 250_000
"""Of the largest picture that the server takes: more than any here has, few enough to be decoded by the thousand."""

SPARE = "spare"
"""A model that may come and go; the others stay, lest nothing be left to ask."""

MODELS = ("classification", "segmentation", "embedding", "sequence", "detection", "gated")
_EXPLAIN = "/camserve.v1.ExplanationService/Explain"
_OTHERS: dict[str, type[Message]] = {
    f"/camserve.v1.ModelService/{name.removesuffix('Request')}": getattr(model_service_pb2, name)
    for name in ("ListModelsRequest", "GetModelRequest", "LoadModelRequest", "UnloadModelRequest")
}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One call.

    Attributes:
        rpc: full name.
        message: as it goes over the wire.
    """

    rpc: str
    message: bytes


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _pictures() -> list[bytes]:
    """A small sound file of every format and way of storing pixels that is taken, and of some that are not."""
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    ramp = Image.fromarray(colours).resize((23, 18), Image.Resampling.BICUBIC)
    deep = Image.fromarray((np.arange(23 * 18, dtype=np.uint16) * 150).reshape(18, 23))
    exif = Image.Exif()
    exif[0x0112] = 6
    sound = [
        _saved(ramp, "JPEG", exif=exif),
        _saved(ramp, "JPEG", progressive=True, quality=30),
        _saved(ramp.convert("L"), "JPEG", optimize=True, comment=b"hello"),
        _saved(ramp.convert("CMYK"), "JPEG"),
        *(_saved(ramp.convert(mode), "PNG", exif=exif) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        _saved(ramp.quantize(7), "PNG", transparency=bytes([0, 9, 255])),
        _saved(deep, "PNG"),
        _saved(ramp, "WEBP", quality=40, exif=exif),
        _saved(ramp.convert("RGBA"), "WEBP", lossless=True),
        *(_saved(ramp.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB")),
        *(
            _saved(ramp, "TIFF", compression=name, exif=exif)
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ),
        _saved(ramp.convert("1"), "TIFF", compression="group4"),
        _saved(deep, "TIFF"),
        _saved(ramp, "TIFF", big_tiff=True),
    ]
    frames = [ramp, ramp.transpose(Image.Transpose.ROTATE_180)]
    several = {"save_all": True, "append_images": frames[1:]}
    return [*sound, *(_saved(frames[0], kind, **several) for kind in ("GIF", "WEBP", "TIFF", "PNG"))]


_PICTURES = _pictures()
_TENSOR = np.linspace(-1, 1, 3 * SIDE * SIDE, dtype="<f4")
_TENSORS = [
    _TENSOR.tobytes(),
    np.full_like(_TENSOR, np.nan).tobytes(),
    np.full_like(_TENSOR, np.inf).tobytes(),
    _TENSOR.astype("<f8").tobytes(),
    _TENSOR.astype("<f2").tobytes(),
    _TENSOR.tobytes()[:-1],
]

# Numbers at which something ends: bounds of what is documented, of types, and of what a small model has.
_INTEGERS = (0, 1, 2, 3, 4, 5, 7, SIDE, 1_000, 10_001, 2**31 - 1, -1, -(2**31))
_LARGE = (*_INTEGERS, 2**32, 2**63 - 1, -(2**63))
_FLOATS = (0.0, 0.25, 0.5, 1.0, 2.0, -1.0, 1e-45, 3.4e38, 1e300, math.nan, math.inf, -math.inf)
_TEXTS = (
    "",
    "x",
    "conv",
    "stem.conv",
    "stem",
    "pool",
    "good",
    "a label",
    "1",
    "../1",
    "mask",
    "out.0",
    "\0",
    "é\u202e🙂",
    "%n%s{0}",
    "a" * 300,
    "b" * 20_000,
    SPARE,
    *MODELS,
)


@functools.cache
def _value(field: descriptors.FieldDescriptor) -> st.SearchStrategy[Any]:
    """One value of a field that holds no message."""
    if field.enum_type is not None:
        known = [value.number for value in field.enum_type.values]
        return st.sampled_from([*known, *known, -1, 99, 2**31 - 1])
    if field.type == field.TYPE_BYTES:
        return st.sampled_from([*_TENSORS, *_PICTURES[:3]]) | st.binary(max_size=40)
    return {
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_FLOAT: st.sampled_from(_FLOATS) | st.floats(width=32),
        field.CPPTYPE_INT64: st.sampled_from(_LARGE) | st.integers(-(2**63), 2**63 - 1),
        field.CPPTYPE_INT32: st.sampled_from(_INTEGERS) | st.integers(-5, 40),
        field.CPPTYPE_STRING: st.sampled_from(_TEXTS) | st.text(max_size=8),
    }[field.cpp_type]


def _is_map(field: descriptors.FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _fill(draw: st.DrawFn, message: Message, field: descriptors.FieldDescriptor, depth: int) -> None:
    """Gives a field a value, or several where it takes several; messages get some fields of their own."""
    if _is_map(field):
        key, value = field.message_type.fields
        for _ in range(draw(st.integers(0, 3))):
            held = getattr(message, field.name)
            name = draw(_value(key))
            if value.message_type is None:
                held[name] = draw(_value(value))
            else:
                _fill_some(draw, held[name], depth)
        return
    # A list as long as fifty is rare, and says the same again.
    times = draw(st.sampled_from([1, 1, 2, 3, 50])) if field.is_repeated else 1
    if field.message_type is None:
        value = draw(_value(field))
        if field.is_repeated:
            getattr(message, field.name).extend([value] * times)
        else:
            setattr(message, field.name, value)
        return
    if field.is_repeated:
        first = getattr(message, field.name).add()
        _fill_some(draw, first, depth)
        for _ in range(times - 1):
            getattr(message, field.name).add().CopyFrom(first)
    else:
        getattr(message, field.name).SetInParent()
        _fill_some(draw, getattr(message, field.name), depth)


def _fill_some(draw: st.DrawFn, message: Message, depth: int) -> None:
    fields = message.DESCRIPTOR.fields
    if not fields or depth == 0:
        return
    for _ in range(draw(st.integers(0, 4))):
        _fill(draw, message, fields[draw(st.integers(0, len(fields) - 1))], depth - 1)


def _within(message: Message) -> Iterator[Message]:
    """The message and all that are set in it, maps apart."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None or _is_map(field):
            continue
        for inner in value if field.is_repeated else [value]:
            yield from _within(inner)


_KINDS_OF_TARGET = {
    "classification": ["predicted", "class_index", "kth", "top", "above", "difference"],
    "segmentation": ["region", "predicted", "class_index"],
    "embedding": ["embedding", "text"],
    "sequence": ["steps", "class_index"],
    "detection": ["detection", "predicted"],
    "gated": ["predicted", "top"],
}
_TARGETS = {
    "predicted": {"predicted": {}},
    "class_index": {"class_index": 1},
    "kth": {"kth": {"k": 2}},
    "top": {"top": {"k": 2}},
    "above": {"above": {"probability": 0.1}},
    "difference": {"difference": {"class_index": 0, "other_class_index": 1}},
    "region": {"region": {"class_index": 0, "box": {"width_pixels": 8, "height_pixels": 8}}},
    "embedding": {"embedding": {"vector": {"values": [1, 0, 0, 2, 0, 0]}}},
    "text": {"text": "a label"},
    "steps": {"steps": {"first": 1, "count": 2}},
    "detection": {"detection": {"box": {"width_pixels": 12, "height_pixels": 18}, "min_iou": 0.01}},
}
_CHEAP = spec_pb2.Parameters(channels=3, samples=3, steps=3, window=4, stride=4)
_COUNTS = {
    spec_pb2.METHOD_SCORE_CAM: ("channels",),
    spec_pb2.METHOD_ABLATION_CAM: ("channels",),
    spec_pb2.METHOD_SMOOTH_GRAD: ("samples",),
    spec_pb2.METHOD_SMOOTH_GRAD_CAM_PLUS_PLUS: ("samples",),
    spec_pb2.METHOD_INTEGRATED_GRADIENTS: ("steps",),
    spec_pb2.METHOD_SS_CAM: ("samples", "channels"),
    spec_pb2.METHOD_IS_CAM: ("steps", "channels"),
    spec_pb2.METHOD_RISE: ("samples",),
    spec_pb2.METHOD_SESS: ("window",),
    spec_pb2.METHOD_OCCLUSION: ("window", "stride"),
}
_METHODS = [value.number for value in spec_pb2.Method.DESCRIPTOR.values]


def _parameters(method: int) -> spec_pb2.Parameters:
    return spec_pb2.Parameters(**{name: getattr(_CHEAP, name) for name in _COUNTS.get(method, ())})


def _sound(draw: st.DrawFn) -> service_pb2.ExplainRequest:
    """A request that most models here would answer."""
    model = draw(st.sampled_from(MODELS))
    request = service_pb2.ExplainRequest(model=model)
    match draw(st.sampled_from(["tensor", "image", "frame"])):
        case "tensor":
            shape = (3, SIDE, SIDE)
            request.tensor.CopyFrom(
                input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=shape, data=_TENSORS[0])
            )
        case "image":
            request.image.data = draw(st.sampled_from(_PICTURES))
        case "frame":
            request.frame.CopyFrom(
                input_pb2.RawFrame(pixel_format=3, width_pixels=9, height_pixels=7, data=bytes(9 * 7 * 3))
            )
    if model == "gated":
        mask = np.ones(SIDE * SIDE // 4, "<f4").tobytes()
        request.extra_inputs["mask"].CopyFrom(
            input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=(1, SIDE // 2, SIDE // 2), data=mask)
        )
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        method = draw(st.sampled_from(_METHODS))
        target = spec_pb2.Target(**_TARGETS[draw(st.sampled_from(_KINDS_OF_TARGET[model]))])
        request.specs.add(method=method, target=target, parameters=_parameters(method))
    return request


@st.composite
def _changed(draw: st.DrawFn) -> bytes:
    """A sound request in which up to three fields, anywhere, have another value."""
    request = _sound(draw)
    for _ in range(draw(st.integers(0, 3))):
        places = list(_within(request))
        place = places[draw(st.integers(0, len(places) - 1))]
        fields = place.DESCRIPTOR.fields
        if fields:
            field = fields[draw(st.integers(0, len(fields) - 1))]
            if draw(st.integers(0, 5)) == 0:
                place.ClearField(field.name)
            else:
                _fill(draw, place, field, 2)
    return request.SerializeToString()


@st.composite
def _drawn(draw: st.DrawFn, kind: type[Message]) -> bytes:
    """A message of which any field has any value."""
    message = kind()
    _fill_some(draw, message, 4)
    return message.SerializeToString()


@st.composite
def _broken(draw: st.DrawFn) -> bytes:
    """Bytes that may be no message, or hold a field of a oneof twice, as the wire allows."""
    message = draw(_changed())
    match draw(st.sampled_from(["cut", "joined", "changed", "unknown", "nested", "random"])):
        case "cut":
            return message[: draw(st.integers(0, max(0, len(message) - 1)))]
        case "joined":
            return message + draw(_changed())
        case "changed":
            return _overwritten(draw, message)
        case "unknown":
            field, kind = draw(st.integers(1, 2**29 - 1)), draw(st.integers(0, 7))
            return message + _varint(field << 3 | kind) + draw(st.binary(max_size=20))
        case "nested":
            # Groups in groups: what is not known must be skipped without descending for ever.
            return b"\xf3\x06" * draw(st.integers(1, 400)) + message
    return draw(st.binary(max_size=200))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _overwritten(draw: st.DrawFn, data: bytes, times: int = 4) -> bytes:
    """Some bytes, half of them in front where headers are, have another value."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, times))):
        last = (min(64, len(data)) if draw(st.booleans()) else len(data)) - 1
        if last >= 0:
            changed[draw(st.integers(0, last))] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    return bytes(changed)


def _leaves_models(case: Case) -> bool:
    """Whether a call neither takes away nor replaces a model that others ask for."""
    return "load" not in case.rpc.lower() or not any(name.encode() in case.message for name in MODELS)


def cases() -> st.SearchStrategy[Case]:
    """Calls of every method; most ask for an explanation."""
    explain = st.one_of(
        _changed(), _changed(), _changed(), _changed(), _drawn(service_pb2.ExplainRequest), _broken(), _damaged()
    ).map(functools.partial(Case, _EXPLAIN))
    others = st.one_of(
        *(
            st.one_of(_drawn(kind), st.binary(max_size=30)).map(functools.partial(Case, rpc)).filter(_leaves_models)
            for rpc, kind in _OTHERS.items()
        )
    )
    return st.one_of(*[explain] * 9, others)


# What headers hold: sizes, counts and offsets, at the ends of their types.
_SIZES = (0, 1, 2, 0x7F, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 500, 501, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_WORDS = [struct.Struct(form) for form in ("<H", ">H", "<I", ">I")]


@st.composite
def _damaged_picture(draw: st.DrawFn) -> bytes:
    """A picture of which a part is missing, doubled, changed, or another picture's."""
    data = draw(st.sampled_from(_PICTURES))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "size", "size", "bytes", "without", "twice", "spliced", "behind"])):
            case "cut":
                data = data[:start]
            case "size":
                word = draw(st.sampled_from(_WORDS))
                place = draw(st.integers(0, 80)) if draw(st.booleans()) else start
                packed = word.pack(draw(st.sampled_from(_SIZES)) & (1 << 8 * word.size) - 1)
                data = data[:place] + packed + data[place + word.size :]
            case "bytes":
                data = _overwritten(draw, data, 12)
            case "without":
                data = data[:start] + data[start + draw(st.integers(0, 64)) :]
            case "twice":
                data = data[:start] + data[start : start + 200] + data[start:]
            case "spliced":
                other = draw(st.sampled_from(_PICTURES))
                data = data[:start] + other[draw(st.integers(0, len(other))) :]
            case "behind":
                data += draw(st.binary(max_size=40)) + draw(st.sampled_from(_PICTURES))
    return data


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """A request with a damaged picture, with and without what needs the picture itself."""
    request = service_pb2.ExplainRequest(model="classification", image={"data": draw(_damaged_picture())})
    match draw(st.sampled_from(["", "map", "overlay", "region", "reference"])):
        case "map":
            request.specs.add(method=spec_pb2.METHOD_GRAD_CAM, size=spec_pb2.MAP_SIZE_SOURCE)
        case "overlay":
            request.specs.add(method=spec_pb2.METHOD_GRAD_CAM, encoding=spec_pb2.ENCODING_OVERLAY_WEBP)
        case "region":
            request.region_of_interest.width_pixels, request.region_of_interest.height_pixels = 10, 10
        case "reference":
            request.model = "embedding"
            target = spec_pb2.Target(embedding={"image": {"data": draw(_damaged_picture())}})
            request.image.data = _PICTURES[0]
            request.specs.add(method=spec_pb2.METHOD_GRAD_CAM, target=target)
    return request.SerializeToString()


def picture_cases() -> st.SearchStrategy[Case]:
    """Requests with damaged pictures."""
    return _damaged().map(functools.partial(Case, _EXPLAIN))


def pictures() -> Sequence[bytes]:
    """The sound ones."""
    return _PICTURES

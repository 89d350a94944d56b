"""Tensors of the protocol: what a request's inputs hold, row by row, and arrays as a reply's outputs.

Inputs arrive as messages and leave as bytes of rows, their values unlooked at; arrays leave as outputs. For `requests.py` and
`answers.py`; nothing here knows a model.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from camserve.server.errors import InvalidRequest, Reason, Unsupported

__all__ = ["DATATYPES", "Input", "Output", "datatype_of", "put_output", "read_inputs"]

# Element types that a model may be sent, and what numpy and `jobs` call them.
DATATYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"FP32": "float32", "FP16": "float16", "FP64": "float64", "UINT8": "uint8", "BF16": "bfloat16"}
)
_SIZES: Final = {"FP32": 4, "FP16": 2, "FP64": 8, "UINT8": 1, "BF16": 2}
# The field of a tensor's contents that holds its type, and how it is read from there.
_CONTENTS: Final = {
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "UINT8": ("uint_contents", "<u4"),
}
_MAX_RANK: Final = 32
# No request that could be meant has more files; finding out costs time that grows with them.
_MOST_ELEMENTS: Final = 65_536


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a request.

    Attributes:
        name: as the caller wrote it.
        datatype: a key of DATATYPES, or BYTES.
        shape: as the caller wrote it.
        data: elements, little-endian in C order; empty for BYTES.
        elements: of BYTES.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes = b""
    elements: tuple[bytes, ...] = ()

    @property
    def field(self) -> str:
        """Its path in the request."""
        return f"inputs[{self.name}]"

    def rows(self, rank: int) -> list[bytes]:
        """The data of each row.

        Args:
            rank: of one row; an input of as many axes is one row, of one more a batch.

        Raises:
            InvalidRequest: it has another number of axes.
        """
        if len(self.shape) == rank:
            return [self.data]
        if len(self.shape) != rank + 1:
            raise mismatch(self, f"has {len(self.shape)} axes; send {rank} for one row, or {rank + 1}, the batch first")
        size = len(self.data) // self.shape[0]
        return [self.data[start : start + size] for start in range(0, len(self.data), size)]


def mismatch(given: Input, said: str) -> InvalidRequest:
    """What refuses an input; `said` goes on after its description."""
    sizes = ", ".join(map(str, given.shape))
    return InvalidRequest(
        Reason.TENSOR_MISMATCH,
        f"{given.field} of {given.datatype} [{sizes}] {said}",
        field=given.field,
        metadata={"name": given.name, "datatype": given.datatype, "shape": sizes},
    )


def read_inputs(request: Any) -> dict[str, Input]:
    """The inputs of a ModelInferRequest by name; sizes and bytes agree.

    Takes time that grows with the contents, unless they are raw.

    Raises:
        InvalidRequest: an input is there twice, or its type, shape and contents do not agree.
        Unsupported: it lies in shared memory.
    """
    count = len(request.raw_input_contents)
    if count and count != len(request.inputs):
        raise _wrong(
            "raw_input_contents",
            f"holds {count} for {len(request.inputs)} inputs; send one for each, or none and typed contents",
        )
    raw = list(request.raw_input_contents)
    found: dict[str, Input] = {}
    for place, message in enumerate(request.inputs):
        if message.name in found:
            raise _wrong(f"inputs[{message.name}]", "is sent twice; send each input once")
        found[message.name] = _input(message, raw[place] if raw else None)
    return found


def _input(message: Any, raw: bytes | None) -> Input:
    field = f"inputs[{message.name}]"
    if len(message.shape) > _MAX_RANK:
        raise _wrong(f"{field}.shape", f"has {len(message.shape)} sizes; give 1 to {_MAX_RANK}")
    shape = tuple(message.shape)
    if any(name.startswith("shared_memory_") for name in message.parameters):
        raise Unsupported(
            Reason.FEATURE_NOT_IMPLEMENTED,
            f"{field} lies in shared memory, which this server does not read; send it in the request",
            field=field,
        )
    if not shape or any(size < 1 for size in shape):
        raise _wrong(f"{field}.shape", f"is {list(shape)}; give 1 to {_MAX_RANK} sizes, each at least 1")
    given = Input(name=message.name, datatype=message.datatype, shape=shape)
    if message.datatype != "BYTES" and message.datatype not in DATATYPES:
        raise mismatch(given, f"cannot be taken; send one of {', '.join((*DATATYPES, 'BYTES'))}")
    if raw is not None and message.HasField("contents") and message.contents.ByteSize():
        raise mismatch(given, "has both raw and typed contents; send one of them")
    count = math.prod(shape)
    if message.datatype == "BYTES":
        return dataclasses.replace(given, elements=_elements(given, message.contents, raw, count))
    data = _typed(given, message.contents, count) if raw is None else raw
    needed = count * _SIZES[message.datatype]
    if len(data) != needed:
        raise mismatch(given, f"takes {needed} bytes; {len(data)} came")
    return dataclasses.replace(given, data=data)


def _typed(given: Input, contents: Any, count: int) -> bytes:
    """Typed contents as bytes."""
    if given.datatype not in _CONTENTS:
        raise mismatch(given, "has no field among typed contents; send it as raw_input_contents")
    name, kind = _CONTENTS[given.datatype]
    values = getattr(contents, name)
    if len(values) != count:
        raise mismatch(given, f"takes {count} elements in {name}; {len(values)} came")
    array = np.fromiter(values, kind, count)
    if given.datatype != "UINT8":
        return array.tobytes()
    if array.max() > 255:
        raise mismatch(given, f"holds {array.max()} in {name}; UINT8 ends at 255")
    return array.astype(np.uint8).tobytes()


def _elements(given: Input, contents: Any, raw: bytes | None, count: int) -> tuple[bytes, ...]:
    """The elements of BYTES: their number is the shape's."""
    if count > _MOST_ELEMENTS:
        raise mismatch(given, f"has {count} elements; send at most {_MOST_ELEMENTS}")
    if raw is None:
        elements = tuple(contents.bytes_contents) if len(contents.bytes_contents) <= _MOST_ELEMENTS else ()
        came = len(contents.bytes_contents)
    else:
        elements = tuple(_prefixed(given, raw, count))
        came = len(elements)
    if came != count:
        raise mismatch(given, f"takes {count} elements; {came} came")
    return elements


def _prefixed(given: Input, raw: bytes, count: int) -> Iterable[bytes]:
    """Elements of raw contents, each behind its length; one more than the count ends it."""
    start = 0
    for _ in range(count + 1):
        if start == len(raw):
            return
        if start + 4 > len(raw):
            raise mismatch(given, "ends inside a length; send each element behind its length in 4 bytes, little-endian")
        (length,) = struct.unpack_from("<I", raw, start)
        start += 4
        if start + length > len(raw):
            raise mismatch(given, f"ends inside an element of {length} bytes: {len(raw) - start} are left")
        yield raw[start : start + length]
        start += length


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """One output of a reply.

    Attributes:
        name: as it was asked for.
        values: an array of numbers, or of bytes objects.
        facts: its parameters.
        raw: the elements as they are sent, where they are at hand already: a map may be as large as a photograph.
    """

    name: str
    values: npt.NDArray[Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    raw: bytes | None = None


_OF_NUMPY: Final = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64", "object": "BYTES"}


def datatype_of(values: npt.NDArray[Any]) -> str:
    """What the protocol calls an array's element type."""
    return _OF_NUMPY[values.dtype.name]


def put_output(response: Any, output: Output) -> None:
    """Appends an output to a ModelInferResponse, its elements raw."""
    message = response.outputs.add(
        name=output.name, datatype=datatype_of(output.values), shape=list(output.values.shape)
    )
    for name, fact in output.facts.items():
        message.parameters[name].CopyFrom(fact)
    response.raw_output_contents.append(_raw(output.values) if output.raw is None else output.raw)


def _raw(values: npt.NDArray[Any]) -> bytes:
    if values.dtype == object:
        return b"".join(struct.pack("<I", len(element)) + element for element in _flat(values))
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _flat(values: npt.NDArray[Any]) -> Sequence[bytes]:
    return [bytes(element) for element in values.reshape(-1)]


def _wrong(field: str, said: str) -> InvalidRequest:
    return InvalidRequest(Reason.FIELD_INVALID, f"{field} {said}", field=field)

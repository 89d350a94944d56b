"""How many fields a message holds, counted before it is parsed: an empty submessage takes two bytes, and parsed a hundred.

`interceptors.py` hands in every message; only large ones are looked at. 64 MiB of empty specs would become gigabytes, and hold
the interpreter for seconds.
"""

from __future__ import annotations

from typing import Any, Final

from camserve.server.errors import InvalidRequest, Reason

__all__ = ["check_extent"]

# Below that, whatever it holds becomes little.
_SMALL_BYTES: Final = 262_144
# Far more than any request that is answered; going through them takes about 10 ms.
_MOST_FIELDS: Final = 20_000
# protobuf's own limit.
_MOST_LEVELS: Final = 100
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


class _TooManyError(Exception):
    """More fields than are counted."""


def check_extent(message: bytes, descriptor: Any) -> None:
    """Refuses a large message of very many fields; one that is malformed is left to the parser.

    Args:
        message: as it arrived.
        descriptor: of its type.

    Raises:
        InvalidRequest: too many fields.
    """
    if len(message) <= _SMALL_BYTES:
        return
    try:
        _count(message, 0, len(message), descriptor, _MOST_FIELDS, 0)
    except IndexError:
        return
    except _TooManyError:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"a message of {len(message)} bytes with more than {_MOST_FIELDS} fields is no request that could be answered; "
            "send numbers packed or raw",
            metadata={"bytes": len(message), "limit": _MOST_FIELDS},
        ) from None


def _count(message: bytes, place: int, end: int, descriptor: Any, left: int, level: int) -> int:
    """Counts the fields between two places, those of submessages among them; returns how many are left."""
    fields = descriptor.fields_by_number
    while place < end:
        left -= 1
        if left < 0:
            raise _TooManyError
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            _, place = _varint(message, place)
        elif kind == _FIXED64:
            place += 8
        elif kind == _FIXED32:
            place += 4
        elif kind == _DELIMITED:
            length, place = _varint(message, place)
            field = fields.get(tag >> 3)
            if length and field is not None and field.message_type is not None and level < _MOST_LEVELS:
                left = _count(message, place, min(place + length, end), field.message_type, left, level + 1)
            place += length
    return left


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends.

    Raises:
        IndexError: the message ends before.
    """
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80 or shift >= 63:
            return value, place
        shift += 7

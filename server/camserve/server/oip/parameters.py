"""Parameters of the protocol as plain values, and the values of replies as parameters.

Clients differ in the field they put a value into: KServe's stored message has no field for numbers with a point, tritonclient
sends priorities as unsigned, and some know nothing but texts. So whatever says the value without doubt is taken.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from camserve.server.errors import InvalidRequest, Reason
from camserve.server.oip.messages import InferParameter

__all__ = ["Value", "number", "parameter", "switch", "text", "unknown", "values", "whole"]

Value: TypeAlias = bool | int | float | str

# A name may be as long as a message; finding near ones takes time that grows with it, and this is the event loop.
_COMPARED_CHARACTERS = 128
# Parameters are words and numbers, and at most a table with a vector in it. Reading more would take time on the event loop.
_MOST_PARAMETERS = 256
_LONGEST_TEXT = 1 << 20
# No number that anything takes has more digits.
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")


def values(parameters: Mapping[str, Any], field: str) -> dict[str, Value]:
    """The values of a map of parameters.

    Args:
        parameters: of a request, an output or the repository.
        field: path of the map, for errors.

    Raises:
        InvalidRequest: one has no value, or bytes, or a very long text; or there are very many.
    """
    if len(parameters) > _MOST_PARAMETERS:
        raise _wrong(field, f"holds {len(parameters)}, more than {_MOST_PARAMETERS}")
    found: dict[str, Value] = {}
    for name, given in parameters.items():
        kind = given.WhichOneof("parameter_choice")
        if kind is None or kind == "bytes_param":
            raise _wrong(f"{field}[{name}]", "has no value; set one of bool, int64, uint64, double or string")
        value = getattr(given, kind)
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise _wrong(f"{field}[{name}]", f"has {len(value)} characters, more than {_LONGEST_TEXT}")
        found[name] = value
    return found


def switch(value: Value, field: str) -> bool:
    """A truth value, also as text.

    Raises:
        InvalidRequest: it is none.
    """
    if isinstance(value, bool):
        return value
    said = str(value).strip().lower()
    if said not in ("true", "false"):
        raise _wrong(field, f"must be true or false, is {value!r}")
    return said == "true"


def whole(value: Value, field: str) -> int:
    """A whole number, also as text or with a point and zeros behind it.

    Raises:
        InvalidRequest: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value)
    found = number(value, field)
    if found != int(found):
        raise _wrong(field, f"must be a whole number, is {value!r}")
    return int(found)


def number(value: Value, field: str) -> float:
    """A finite number, also as text.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise _wrong(field, f"must be a finite number, is {value!r}")
    return found


def text(value: Value, field: str) -> str:
    """A text.

    Raises:
        InvalidRequest: it is none.
    """
    if not isinstance(value, str):
        raise _wrong(field, f"must be a text, is {value!r}")
    return value


def parameter(value: Value) -> Any:
    """A value as the protocol carries it."""
    match value:
        case bool():
            return InferParameter(bool_param=value)
        case int():
            return InferParameter(int64_param=value)
        case float():
            return InferParameter(double_param=value)
        case str():
            return InferParameter(string_param=value)


def unknown(what: str, name: str, known: Iterable[str], field: str) -> InvalidRequest:
    """What refuses a name; it tells the nearest one."""
    names = list(known)
    near = difflib.get_close_matches(name[:_COMPARED_CHARACTERS], names, n=1)
    hint = f"; did you mean {near[0]!r}? Known:" if near else "; known:"
    return InvalidRequest(
        Reason.FIELD_INVALID,
        f"{what} {name!r} is unknown{hint} {', '.join(names)}",
        field=field,
        metadata={"name": name},
    )


def _wrong(field: str, said: str) -> InvalidRequest:
    return InvalidRequest(Reason.FIELD_INVALID, f"{field} {said}", field=field)

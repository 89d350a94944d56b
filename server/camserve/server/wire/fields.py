"""Holds the numbers of a message to their bounds: a value and its field's path arrive, the value leaves or is refused.

For the readers beside this file, which name every field by its path in the request.
"""

from __future__ import annotations

import math

from camserve.server.errors import InvalidRequest, Reason

__all__ = ["at_least", "finite", "invalid", "open_share", "share"]


def at_least(low: int, value: int, field: str) -> int:
    """The value, if it is `low` or more.

    Raises:
        InvalidRequest: it is less.
    """
    if value < low:
        raise invalid(field, f"must be at least {low}, is {value}")
    return value


def finite(value: float, field: str) -> float:
    """The value, if it is a number.

    Raises:
        InvalidRequest: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise invalid(field, f"must be a finite number, is {value}")
    return value


def share(value: float, field: str) -> float:
    """The value, if it is from 0 to 1.

    Raises:
        InvalidRequest: it is not.
    """
    if not 0 <= value <= 1:
        raise invalid(field, f"must be from 0 to 1, is {value}")
    return value


def open_share(value: float, field: str) -> float:
    """The value, if it is above 0 and at most 1.

    Raises:
        InvalidRequest: it is not.
    """
    if not 0 < value <= 1:
        raise invalid(field, f"must be above 0 and at most 1, is {value}")
    return value


def invalid(field: str, said: str) -> InvalidRequest:
    """What refuses a field; `said` goes on after its path."""
    return InvalidRequest(Reason.FIELD_INVALID, f"{field} {said}", field=field)

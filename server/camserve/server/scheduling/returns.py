"""Who is likely to come back: callers that wait for an answer before they ask again.

`queue.py` tells when a pass ended and when a request came; the planner asks how many more of a model are to be expected within
the window behind its last pass. Without it a device that is free at once takes the first who comes back alone, and makes all
others wait a whole pass behind it, for ever after: eight callers ride as one and seven.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

__all__ = ["Returns"]

Model: TypeAlias = tuple[str, str]

# How much the last pass says of the next.
_WEIGHT = 0.2
# Half a request is as good as none.
_FEWEST = 0.5


@dataclasses.dataclass(slots=True)
class _Last:
    """The last pass of one model, with those before it that ended less than a window earlier.

    Attributes:
        began_at: monotonic seconds at which the first of them ended.
        ended_at: monotonic seconds at which the last of them ended.
        rows: answered by them.
        came: how many came since, and within the window.
        share: of the rows answered, how many are usually followed by another request within the window.
    """

    began_at: float
    ended_at: float
    rows: int
    came: int = 0
    share: float = 1.0


class Returns:
    """Learns for each model which share of those answered asks again at once.

    Args:
        window_seconds: longest time that counts as at once.
    """

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._last: dict[Model, _Last] = {}

    def ended(self, model: Model, rows: int, now: float) -> None:
        """A pass ended and answered so many rows."""
        last = self._last.get(model)
        if last is None:
            self._last[model] = _Last(now, now, rows)
            return
        if now <= last.began_at + self._window_seconds:
            last.rows += rows
        else:
            if last.rows:
                last.share += _WEIGHT * (min(1.0, last.came / last.rows) - last.share)
            last.began_at, last.rows, last.came = now, rows, 0
        last.ended_at = now

    def came(self, model: Model, now: float) -> None:
        """A request for that model is past the door."""
        last = self._last.get(model)
        if last is not None and now <= last.ended_at + self._window_seconds:
            last.came += 1

    def expected_since(self, now: float, arriving: Mapping[Model, int] = MappingProxyType({})) -> dict[Model, float]:
        """When the last pass ended, by model of which more are likely within the window behind it, or are being decoded."""
        return {
            model: last.ended_at
            for model, last in self._last.items()
            if now < last.ended_at + self._window_seconds
            and (last.rows * last.share - last.came >= _FEWEST or arriving.get(model))
        }

    def forget(self, model: Model) -> None:
        """A model is gone."""
        self._last.pop(model, None)

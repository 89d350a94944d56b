"""What the rows of a request were answered, as outputs: predictions of all rows, then each heatmap once all rows have it.

`inference.py` feeds events; outputs leave. Pure.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from camserve.server import jobs
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.models.card import ModelCard
from camserve.server.oip.parameters import Value, parameter
from camserve.server.oip.predictions import PREDICTIONS, ranked
from camserve.server.oip.requests import WantedHeatmap, WantedPrediction
from camserve.server.oip.tensors import Output

__all__ = ["Maps", "heatmap_output", "prediction_outputs"]

_CELLS: Final[Mapping[jobs.Encoding, str]] = MappingProxyType(
    {jobs.Encoding.FLOAT32: "<f4", jobs.Encoding.FLOAT16: "<f2", jobs.Encoding.UINT8: "u1"}
)


def prediction_outputs(
    wanted: Sequence[WantedPrediction], rows: Sequence[jobs.Prediction], card: ModelCard
) -> list[Output]:
    """What the model said of each row, as the outputs asked for."""
    known = PREDICTIONS[card.output_kind]
    outputs = []
    for output in wanted:
        values = known[output.name].values(rows)
        outputs.append(
            Output(name=output.name, values=values if output.best is None else ranked(values, output.best, card))
        )
    return outputs


class Maps:
    """The maps of one heatmap output as they come in, of every row."""

    def __init__(self, rows: int) -> None:
        self._of_rows: list[dict[int, jobs.Heatmap]] = [{} for _ in range(rows)]

    def add(self, row: int, heatmap: jobs.Heatmap) -> None:
        """Takes a map."""
        self._of_rows[row][heatmap.raw.target.rank] = heatmap

    @property
    def is_complete(self) -> bool:
        """Whether every row has all of its maps."""
        return all(maps and len(maps) == _count(maps) for maps in self._of_rows)

    def rows(self) -> list[list[jobs.Heatmap]]:
        """The maps of each row, in order."""
        return [[maps[rank] for rank in sorted(maps)] for maps in self._of_rows]


def _count(maps: Mapping[int, jobs.Heatmap]) -> int:
    return next(iter(maps.values())).raw.target.count


def heatmap_output(wanted: WantedHeatmap, rows: Sequence[Sequence[jobs.Heatmap]]) -> Output:
    """Maps as an output: (rows, cells), or (rows, maps, cells) where a row may have several; files as BYTES without the cells.

    Raises:
        InvalidRequest: rows have maps of different sizes, or different numbers of maps.
    """
    if len({len(maps) for maps in rows}) != 1:
        raise _uneven(wanted, f"{' and '.join(str(len(maps)) for maps in rows)} maps")
    every = [heatmap for maps in rows for heatmap in maps]
    lead = (len(rows), len(rows[0])) if wanted.has_several else (len(rows),)
    kind, raw = _CELLS.get(wanted.spec.encoding), None
    if kind is None:
        files = np.empty(len(every), object)
        files[:] = [heatmap.payload for heatmap in every]
        values: npt.NDArray[Any] = files.reshape(lead)
    else:
        shapes = {heatmap.shape for heatmap in every}
        if len(shapes) != 1:
            raise _uneven(wanted, f"maps of {' and '.join(map(str, sorted(shapes)))} cells")
        raw = b"".join(map(_payload, every))
        values = np.frombuffer(raw, kind).reshape(*lead, *shapes.pop())
    return Output(name=wanted.name, values=values, facts=_facts(every, has_several=wanted.has_several), raw=raw)


def _payload(heatmap: jobs.Heatmap) -> bytes:
    is_packed = heatmap.compression is jobs.Compression.ZLIB
    return zlib.decompress(heatmap.payload) if is_packed else heatmap.payload


def _uneven(wanted: WantedHeatmap, said: str) -> InvalidRequest:
    field = f"outputs[{wanted.name}]"
    return InvalidRequest(
        Reason.FIELD_INVALID,
        f"{field}: the rows of this batch have {said}, which do not fit one tensor; send the rows as requests of their own",
        field=field,
    )


def _facts(every: Sequence[jobs.Heatmap], *, has_several: bool) -> dict[str, Any]:
    """What is to be known of the maps: what all share, and what each has; the latter of several maps as a list in JSON."""
    first = every[0]
    shared: dict[str, Value] = {
        "method": first.method,
        "profile": str(first.profile),
        "layer": ",".join(first.raw.layers),
        "format": str(first.encoding),
        "axes": ",".join(first.axes),
    }
    own = [_own(heatmap) for heatmap in every]
    if len(own) == 1 and not has_several:
        told = shared | own[0]
    else:
        names = dict.fromkeys(name for facts in own for name in facts)
        told = shared | {name: json.dumps([facts.get(name) for facts in own]) for name in names}
    return {name: parameter(value) for name, value in told.items()}


def _own(heatmap: jobs.Heatmap) -> dict[str, Value]:
    raw, target = heatmap.raw, heatmap.raw.target
    found: dict[str, Value | None] = {
        "target": target.class_index,
        "label": heatmap.label or None,
        "score": str(target.score),
        "polarity": str(target.polarity),
        "target_value": target.value,
        "other_target": target.other_class_index,
        "step": target.step,
        "cells": target.cells,
        "concept": target.concept,
        "iou": target.iou,
        "phrase": target.phrase or None,
        "value_min": heatmap.value_min,
        "value_max": heatmap.value_max,
        "raw_min": raw.raw_min,
        "raw_max": raw.raw_max,
        "flags": ",".join(sorted(raw.flags)),
        "completed": raw.completed,
        "raw_sha256": heatmap.raw_sha256.hex(),
        "payload_sha256": heatmap.payload_sha256.hex(),
        "box": None if target.box is None else json.dumps(_sides(target.box)),
        "regions": json.dumps(
            [{**_sides(found.box), "peak": found.peak, "share": found.share} for found in heatmap.regions]
        )
        if heatmap.regions
        else None,
    }
    geometry = heatmap.geometry
    if geometry is not None:
        found |= {name: getattr(geometry, name) for name in _PLACED}
    return {name: value for name, value in found.items() if value is not None}


_PLACED: Final = ("scale_x", "offset_x", "scale_y", "offset_y", "source_width", "source_height")


def _sides(box: jobs.Box) -> dict[str, float]:
    return {"left": box.left, "top": box.top, "width": box.width, "height": box.height}

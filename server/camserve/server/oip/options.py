"""What a heatmap's parameters say of how it is made: parameters arrive, a `jobs.Spec` leaves.

Each parameter is a field of the `Spec` that `camserve.v1` carries, in the same words; the wire reads them, so that both fronts
mean the same. For `requests.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from camserve.server import jobs
from camserve.server.cam.methods import METHODS
from camserve.server.errors import InvalidRequest, Reason
from camserve.server.models.card import ModelCard
from camserve.server.oip.parameters import Value, number, switch, text, unknown, whole
from camserve.server.wire.tables import read_table

__all__ = ["OPTIONS", "read_options"]

_DEFAULT_METHOD: Final = "grad-cam"
_INDEX: Final = re.compile(r"[+-]?[0-9]{1,19}")


def _layers(value: Value, field: str) -> object:
    return [name.strip() for name in text(value, field).split(",")]


def _target(value: Value, field: str) -> object:
    """A class by its index or its label, "predicted", or a `Target` written as JSON."""
    if not isinstance(value, str):
        return {"class_index": whole(value, field)}
    said = value.strip()
    if _INDEX.fullmatch(said):
        return {"class_index": whole(said, field)}
    if said == "predicted":
        return {"predicted": {}}
    if not said.startswith("{"):
        return {"class_label": value}
    try:
        found = json.loads(said)
        if "\\u" in said:
            # Half a surrogate pair is JSON but no text: neither a message nor the refusal that names it could hold it.
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f'{field} is no JSON: {error}; write a class index, a label, or a table such as {{"top": {{"k": 3}}}}',
            field=field,
        ) from error
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Option:
    """Where in a `Spec` a parameter goes, and how its value is read."""

    path: tuple[str, ...]
    read: Callable[[Value, str], object]


OPTIONS: Final[Mapping[str, _Option]] = MappingProxyType(
    {
        "method": _Option(("method",), text),
        "layer": _Option(("layers",), _layers),
        "target": _Option(("target",), _target),
        "score": _Option(("target", "score"), text),
        "polarity": _Option(("target", "polarity"), text),
        "output_path": _Option(("target", "output_path"), text),
        "format": _Option(("encoding",), text),
        "size": _Option(("size",), text),
        "profile": _Option(("profile",), text),
        "fusion": _Option(("fusion",), text),
        "rectify": _Option(("rectify",), switch),
        "normalisation": _Option(("normalisation",), text),
        "saliency": _Option(("saliency",), text),
        "overlay_opacity": _Option(("overlay_opacity",), number),
        "augmentation_smooth": _Option(("smoothing", "augmentation"), switch),
        "eigen_smooth": _Option(("smoothing", "eigen"), switch),
        "region_threshold": _Option(("regions", "threshold"), number),
        "max_regions": _Option(("regions", "max_regions"), whole),
        "allow_partial": _Option(("parameters", "allow_partial"), switch),
        "seed": _Option(("parameters", "seed"), whole),
        "noise": _Option(("parameters", "noise"), number),
        "contrast": _Option(("parameters", "contrast"), number),
        **{
            name: _Option(("parameters", name), whole)
            for name in ("channels", "samples", "steps", "window", "stride", "concepts", "similar_classes")
        },
    }
)


def read_options(index: int, name: str, given: Mapping[str, Value], card: ModelCard) -> jobs.Spec:
    """The explanation that a requested output means.

    Args:
        index: its place among the request's explanations.
        name: of the output; what follows "heatmap:" may be a method, which is meant unless a parameter names one.
        given: parameters by name, defaults of the request among them.
        card: of the model.

    Raises:
        CamserveError: a parameter is unknown or wrong, and the field tells which.
    """
    field = f"outputs[{name}]"
    said = name.partition(":")[2]
    table: dict[str, object] = {
        "method": said if said in METHODS else _DEFAULT_METHOD,
        "encoding": str(jobs.Encoding.FLOAT32),
    }
    # A target is a table of its own, into which its score and polarity go.
    for option in sorted(given, key=lambda known: known != "target"):
        known = OPTIONS.get(option)
        if known is None:
            raise unknown("parameter", option, OPTIONS, f"{field}.parameters[{option}]")
        *way, last = known.path
        place = table
        for step in way:
            inner = place.setdefault(step, {})
            if not isinstance(inner, dict):
                break  # A target that is no table: the wire tells.
            place = inner
        else:
            place[last] = known.read(given[option], f"{field}.parameters[{option}]")
    return dataclasses.replace(read_table(table, card, field), index=index)

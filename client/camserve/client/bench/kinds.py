"""What the words of `camserve bench --method … --set …` mean: `grad-cam@layer2,eigen-cam=3` is a kind of request with two specs.

`command.py` reads its options with `parse_kind` and `parse_settings` before anything is asked of a server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from camserve.client.bench.sweep import PREDICTION
from camserve.client.specs import Spec

GRAMMAR: Final = "METHOD[@LAYER[+LAYER]][,METHOD…][=WEIGHT]"
_TYPES: Final = {field.name: str(field.type) for field in dataclasses.fields(Spec)}
_SETTABLE: Final = tuple(name for name in _TYPES if name not in {"method", "layers"})
_YES_OR_NO: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KindOfRequest:
    """One kind of request of a mix.

    Attributes:
        name: as it was written, without its weight.
        weight: how often it is sent, against the others.
        specs: what it asks for; none for the prediction alone.
    """

    name: str
    weight: float
    specs: tuple[Spec, ...]


def parse_kind(text: str, layers: Sequence[str], settings: Mapping[str, Any]) -> KindOfRequest:
    """Returns the kind of request that a word means.

    Args:
        text: as GRAMMAR says; "prediction" in place of methods asks for no explanation.
        layers: of the methods that name none; several are fused.
        settings: further fields of every `Spec`.

    Raises:
        ValueError: an unknown method, or a weight that is no number above 0.
    """
    name, is_weighted, weight_text = text.partition("=")
    try:
        weight = float(weight_text) if is_weighted else 1.0
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"{weight_text!r} in {text!r} is no weight; write {GRAMMAR}, with a number above 0")
    specs = [] if name == PREDICTION else [_spec(part, layers, settings) for part in name.split(",")]
    return KindOfRequest(name=name, weight=weight, specs=tuple(specs))


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Returns fields of `Spec` from texts such as "samples=500" and "target=scratch".

    Raises:
        ValueError: no such field, or no value of its type.
    """
    found = {}
    for text in texts:
        name, has_value, value = text.partition("=")
        name = name.replace("-", "_")
        if not has_value or name not in _SETTABLE:
            raise ValueError(f"{text!r} sets nothing; write NAME=VALUE with one of {', '.join(_SETTABLE)}")
        try:
            found[name] = _value(_TYPES[name], value)
        except (KeyError, ValueError):
            raise ValueError(f"{value!r} is no value of {name}, which is {_TYPES[name]}") from None
    return found


def _spec(text: str, layers: Sequence[str], settings: Mapping[str, Any]) -> Spec:
    method, names_layers, own = text.partition("@")
    return Spec(method, layers=own.split("+") if names_layers else layers, **settings)


def _value(kind: str, text: str) -> Any:
    if kind == "Target":
        return int(text) if text.isdecimal() else text
    match kind.removesuffix(" | None"):
        case "bool":
            return _YES_OR_NO[text.lower()]
        case "int":
            return int(text)
        case "float":
            return float(text)
    return text

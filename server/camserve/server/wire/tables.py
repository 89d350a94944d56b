"""Specs as a card writes them: a table of TOML, in the fields and words of the wire, to the message that a caller would send.

`rules/reading.py` reads specs of rules from it, and `answers.py` puts the messages on the card: a caller can send the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from google.protobuf import json_format

from camserve.server import jobs
from camserve.server.models.card import ModelCard
from camserve.server.wire import words
from camserve.server.wire.fields import invalid
from camserve.server.wire.specs import read_spec
from camserve.v1 import spec_pb2

__all__ = ["read_table", "spec_message"]

# Descriptors are Any below: their classes are those of whichever implementation of protobuf runs.
_WORDS: Final[Mapping[str, Mapping[Any, int]]] = MappingProxyType(
    {
        descriptor.full_name: words.inverse(table)
        for descriptor, table in (
            (spec_pb2.Method.DESCRIPTOR, words.METHODS),
            (spec_pb2.Profile.DESCRIPTOR, words.PROFILES),
            (spec_pb2.Fusion.DESCRIPTOR, words.FUSIONS),
            (spec_pb2.Score.DESCRIPTOR, words.SCORES),
            (spec_pb2.Polarity.DESCRIPTOR, words.POLARITIES),
            (spec_pb2.Normalisation.DESCRIPTOR, words.NORMALISATIONS),
            (spec_pb2.MapSize.DESCRIPTOR, words.SIZES),
            (spec_pb2.Encoding.DESCRIPTOR, words.ENCODINGS),
            (spec_pb2.Saliency.DESCRIPTOR, words.SALIENCIES),
        )
    }
)


def spec_message(table: Mapping[str, object], field: str) -> spec_pb2.Spec:
    """The message that a table describes.

    Args:
        table: such as `{"method": "grad-cam", "target": {"class_label": "scratch"}}`.
        field: path of the table, for errors.

    Raises:
        InvalidRequest: a field or a word does not exist, or a value is of another type.
    """
    message = spec_pb2.Spec()
    try:
        json_format.ParseDict(_numbered(table, spec_pb2.Spec.DESCRIPTOR, field), message)
    except (json_format.ParseError, OverflowError, TypeError, ValueError) as error:
        raise invalid(field, f"is wrong: {error}") from error
    return message


def read_table(table: Mapping[str, object], card: ModelCard, field: str) -> jobs.Spec:
    """The spec that a table describes, for a model.

    Raises:
        CamserveError: as `spec_message`, or the grammar of specs does not allow it.
    """
    return read_spec(0, spec_message(table, field), card, field)


def _numbered(table: Mapping[str, object], message: Any, field: str) -> dict[str, object]:
    """The table with enum words replaced by numbers; every name in it is one of the message's."""
    known = message.fields_by_name
    found: dict[str, object] = {}
    for name, value in table.items():
        path = f"{field}.{name}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ";"
            raise invalid(path, f"is no field{hint} Known: {', '.join(known)}")
        found[name] = _value(known[name], value, path)
    return found


def _value(descriptor: Any, value: object, path: str) -> object:
    if descriptor.enum_type is not None:
        return _number(descriptor.enum_type, value, path)
    if descriptor.message_type is not None:
        if not isinstance(value, Mapping):
            names = ", ".join(descriptor.message_type.fields_by_name)
            raise invalid(path, f"is {value!r}; write a table of {names}" if names else f"is {value!r}; write {{}}")
        return _numbered(value, descriptor.message_type, path)
    return value


def _number(kind: Any, word: object, path: str) -> int:
    numbers = _WORDS[kind.full_name]
    if not isinstance(word, str) or word not in numbers:
        near = difflib.get_close_matches(str(word), [str(known) for known in numbers], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise invalid(path, f"is {word!r}, which is no word for it{hint} Known: {', '.join(map(str, numbers))}")
    return numbers[word]

"""Every setting with its value, where it comes from and what it means, for `camserve serve --print-config`.

Arrives: settings with their sources. Leaves: a commented TOML file that `--config` takes again, or JSON. Secrets (any setting of
the type `SecretStr`) leave as asterisks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import SecretStr

from camserve.server.settings import Source, SourcedSettings, SourceKind

__all__ = ["json_page", "toml_page"]


def toml_page(sourced: SourcedSettings, flags: Mapping[str, str]) -> str:
    """For people, and for `--config`.

    Args:
        sourced: what is told.
        flags: how each flag is written, by the name of its setting.
    """
    return "\n\n".join(_lines(sourced, flags))


def json_page(sourced: SourcedSettings, flags: Mapping[str, str]) -> str:
    """For programs: a list with an object for each setting. Arguments as for `toml_page`."""
    values = sourced.settings.model_dump(mode="json")
    entries = [
        {
            "name": name,
            "value": values[name],
            "source": sourced.sources[name].kind.value,
            "place": _place(name, sourced.sources[name], flags),
            "description": field.description,
        }
        for name, field in type(sourced.settings).model_fields.items()
    ]
    return json.dumps(entries, indent=2, ensure_ascii=False)


def _lines(sourced: SourcedSettings, flags: Mapping[str, str]) -> Iterator[str]:
    values: Mapping[str, Any] = sourced.settings.model_dump(mode="json")
    for name, field in type(sourced.settings).model_fields.items():
        source = sourced.sources[name]
        place = _place(name, source, flags)
        told = f"{source.kind}{': ' if place else ''}{place}"
        # What is nothing only because somebody said so was written as an empty text.
        value = "" if values[name] is None and field.default is not None else values[name]
        is_kept = value is not None and not isinstance(getattr(sourced.settings, name), SecretStr)
        written = "none" if value is None else json.dumps(value, ensure_ascii=False)
        yield f"# {field.description}\n{'' if is_kept else '# '}{name} = {written}  # {told}"


def _place(name: str, source: Source, flags: Mapping[str, str]) -> str:
    return flags.get(name, "") if source.kind is SourceKind.FLAG else source.place

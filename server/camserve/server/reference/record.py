"""What `trials.py` found, kept beside it as `trials.json` so that `camserve methods` need not try everything again.

`make docs` writes it; a test makes it anew and compares.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["RECORD", "Record", "read_record"]

RECORD: Final = Path(__file__).with_name("trials.json")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Which methods work on what.

    Attributes:
        programs: by method and form of program, why it does not work; empty where it does.
        targets: by method and kind of output, by target, why it is refused; empty where it is not. A kind on which the
            method does not work at all has the one entry "" with the reason.
    """

    programs: Mapping[str, Mapping[str, str]]
    targets: Mapping[str, Mapping[str, Mapping[str, str]]]

    def of(self, slug: str) -> dict[str, Any]:
        """One method's: a reason or nothing for each form, the targets it takes or a reason for each kind."""
        return {
            "programs": dict(self.programs[slug]),
            "targets": {
                kind: told.get("") or ", ".join(name for name, refusal in told.items() if not refusal)
                for kind, told in self.targets[slug].items()
            },
        }

    def to_json(self) -> str:
        """As it is kept: a line a method, so that a change shows as one."""
        sections = (
            f'"{name}": {{\n'
            + ",\n".join(f"{json.dumps(slug)}: {json.dumps(told)}" for slug, told in section.items())
            + "\n}"
            for name, section in dataclasses.asdict(self).items()
        )
        return "{\n" + ",\n".join(sections) + "\n}\n"


@functools.cache
def read_record() -> Record:
    """Reads what was found."""
    return Record(**json.loads(RECORD.read_text(encoding="utf-8")))

"""What the comparisons measured, kept as JSON under `build/` for the terminal's summary and for `docs/conformance.md`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

BUILD = Path(__file__).resolve().parents[3] / "build" / "conformance"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One comparison.

    Attributes:
        library: its name on PyPI.
        method: what was compared.
        network: of what.
        difference: by the gate's measure.
        limit: the gate.
    """

    library: str
    method: str
    network: str
    difference: float
    limit: float


def write(name: str, measured: Iterable[Measured]) -> None:
    """Puts them in the file of that name, in the place of what an earlier run, perhaps of other tests, measured there."""
    BUILD.mkdir(parents=True, exist_ok=True)
    merged = {(one.library, one.method, one.network): one for one in [*read(name), *measured]}
    lines = [dataclasses.asdict(one) for one in merged.values()]
    (BUILD / f"{name}.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def read(name: str) -> list[Measured]:
    """Those of the last run, or none."""
    path = BUILD / f"{name}.json"
    return [Measured(**line) for line in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def largest(measured: Iterable[Measured]) -> list[Measured]:
    """Of each library and method, the network that came least near."""
    worst: dict[tuple[str, str], Measured] = {}
    for one in measured:
        before = worst.setdefault((one.library, one.method), one)
        if one.difference > before.difference:
            worst[one.library, one.method] = one
    return list(worst.values())

"""Writes the tables of docs/conformance.md from what the last runs measured: `python tests/contract/conformance/write_docs.py`.

Run it after `make test` and `make test-slow`, which leave their measurements under `build/conformance/`.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "conformance.md"
LIBRARIES = ("grad-cam", "torchcam", "captum", "torch", "torchvision", "timm")
START, END = "<!-- measured -->", "<!-- /measured -->"


def versions() -> str:
    """One line for the page."""
    return ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in LIBRARIES)


def tables() -> str:
    """Both tables, with versions and date."""
    from contract.conformance.gates import COMPARISONS  # noqa: PLC0415 - `tests` is put on the path below.
    from contract.conformance.table import largest, read  # noqa: PLC0415

    asked = {(one.library, one.method) for one in COMPARISONS}
    small, real = (
        [one for one in read(name) if (one.library, one.method) in asked]
        for name in ("test_conformance", "test_conformance_slow")
    )
    if not small or not real:
        raise SystemExit("measurements are missing: run `make test` and `make test-slow` first")
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    lines = [f"Measured on {today} with {versions()}, on CPU in float32.", "", "### Small networks, every method", ""]
    lines += ["| Library | Method | Largest difference | Gate | Where |", "|---|---|---|---|---|"]
    lines += [
        f"| {one.library} | {one.method} | {one.difference:.1e} | {one.limit:.0e} | {one.network} |"
        for one in largest(small)
    ]
    lines += ["", "### Architectures, every method of one pass", ""]
    methods = list(dict.fromkeys(one.method for one in real))
    networks = list(dict.fromkeys(one.network for one in real))
    worst = {}
    for one in real:
        key = one.method, one.network
        worst[key] = max(worst.get(key, 0.0), one.difference)
    lines += [f"| Method | {' | '.join(networks)} |", f"|---|{'---|' * len(networks)}"]
    for method in methods:
        cells = [f"{worst[method, name]:.0e}" if (method, name) in worst else "" for name in networks]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Replaces what stands between the markers."""
    sys.path.insert(0, str(ROOT / "tests"))
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{tables()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

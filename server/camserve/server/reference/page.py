"""Writes docs/methods.md: every method, and what it works on, read off the code and tried out.

    python -m camserve.server.reference.page docs

`make docs` runs it; a test writes the page anew and compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import click

from camserve.server.cam.methods import METHODS, Family
from camserve.server.reference.facts import CLASSES, MethodFacts, facts_of
from camserve.server.reference.models import FORMS
from camserve.server.reference.record import RECORD, Record

__all__ = ["page"]

_INTRODUCTION: Final = """# Methods

<!-- Written by `make docs` from the code; changes belong there. -->

Every method, what it costs and what it works on. `camserve methods` tells the same in a terminal, `camserve methods NAME` with
the formula, and `camserve models NAME` which of them work on a model of yours. How to read the maps, and when not to trust them:
[gradient-weighted](methods/gradient-weighted.md), [components](methods/components.md), [perturbation](methods/perturbation.md),
[input space](methods/input-space.md), [attention](methods/attention.md).
"""
_YES: Final = "yes"


class _Notes:
    """Reasons, numbered in the order in which they are first given."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def cell(self, refusal: str) -> str:
        """The cell of a table: yes, or the number of the reason."""
        if not refusal:
            return _YES
        return f"({self._numbers.setdefault(refusal, len(self._numbers) + 1)})"

    def lines(self) -> Iterator[str]:
        """The reasons, one a line."""
        for refusal, number in self._numbers.items():
            yield f"- ({number}) {_escaped(refusal)}"


def page(record: Record) -> str:
    """The page, from the table of methods and what the trials found."""
    facts = [facts_of(method) for method in METHODS.values()]
    parts = [
        _INTRODUCTION,
        _table_of_methods(facts),
        _profiles(facts),
        _programs(facts, record),
        _targets(facts, record),
    ]
    return "\n".join(parts)


def _table_of_methods(facts: Iterable[MethodFacts]) -> str:
    lines = ["## All methods\n"]
    lines += [f"Class {work.value}: {told}." for work, told in CLASSES.items()]
    facts = list(facts)
    for family in Family:
        lines += [
            f"\n### [{family.value.replace('-', ' ').capitalize()}](methods/{family.value}.md)\n",
            "| method | class | cost | reads | map | parameters (default) | paper |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line_of_method(told) for told in facts if told.family == family.value]
    return "\n".join(lines) + "\n"


def _line_of_method(told: MethodFacts) -> str:
    kept = "positive" if told.rectifies else "signed"
    parameters = ", ".join(f"`{p.name}` ({p.default})" for p in told.parameters) or "none"
    cells = (
        f"`{told.slug}`",
        told.work,
        told.cost,
        told.reads,
        f"{kept}, with the input's channels" if told.has_channels else kept,
        parameters,
        told.paper,
    )
    return _row(cells)


def _profiles(facts: Iterable[MethodFacts]) -> str:
    lines = [
        "## Profiles\n",
        "Where a library's maps differ from the paper's, a spec's `profile` follows that library; without it, the paper.",
        "\n| method | pytorch-grad-cam | torchcam |",
        "|---|---|---|",
    ]
    for told in facts:
        if any(profile.differs for profile in told.profiles):
            cells = (
                "as the paper" if not p.differs else "not offered" if not p.is_offered else _first_sentences(p.told)
                for p in told.profiles
            )
            lines.append(_row((f"`{told.slug}`", *cells)))
    return "\n".join(lines) + "\n"


def _programs(facts: Iterable[MethodFacts], record: Record) -> str:
    notes = _Notes()
    lines = [
        "## Methods and programs\n",
        "What a small model of each form gave when it was asked for each method: a convolutional classifier in every form, and a",
        "vision transformer with a class token and GELUs. A number is the reason for a refusal, in the server's own words. Your",
        "model may differ: its card tells.\n",
    ]
    lines += [f"- **{form}**: {told}" for form, told in FORMS.items()]
    lines += [f"\n| method | {' | '.join(FORMS)} |", f"|---{'|---' * len(FORMS)}|"]
    for told in facts:
        lines.append(_row((f"`{told.slug}`", *(notes.cell(record.programs[told.slug][form]) for form in FORMS))))
    return "\n".join([*lines, "", *notes.lines()]) + "\n"


def _targets(facts: Iterable[MethodFacts], record: Record) -> str:
    """One table: what a method takes of each kind of output; methods that take the same share a row."""
    notes = _Notes()
    facts = list(facts)
    kinds = list(record.targets[facts[0].slug])
    # What the kind itself lacks is told once, of the method that takes the most.
    offered = {kind: _taken(record.targets["grad-cam"][kind]) for kind in kinds}
    lines = [
        "## Methods and targets\n",
        "What can be asked about, by the kind of output on the model's card; any other target is refused with this list.\n",
        "| output | targets |",
        "|---|---|",
        *(_row((kind, ", ".join(f"`{name}`" for name in offered[kind]))) for kind in kinds),
        "\nWhich of these a method takes: *all* of them, *none*, or all but those named, for the reason given below. These are",
        "the targets' names on the wire; every form of program takes the same.\n",
        f"| method | {' | '.join(kinds)} |",
        f"|---{'|---' * len(kinds)}|",
    ]
    rows: dict[tuple[str, ...], list[str]] = {}
    for told in facts:
        cells = tuple(_target_cell(record.targets[told.slug][kind], offered[kind], notes) for kind in kinds)
        rows.setdefault(cells, []).append(f"`{told.slug}`")
    lines += [_row((", ".join(slugs), *cells)) for cells, slugs in rows.items()]
    return "\n".join([*lines, "", *notes.lines()]) + "\n"


def _taken(told: Mapping[str, str]) -> list[str]:
    return [name for name, refusal in told.items() if not refusal]


def _target_cell(told: Mapping[str, str], offered: Iterable[str], notes: _Notes) -> str:
    if "" in told:
        return f"none {notes.cell(told[''])}"
    refused = {name: told[name] for name in offered if told[name]}
    if not refused:
        return "all"
    reasons = " ".join(dict.fromkeys(notes.cell(refusal) for refusal in refused.values()))
    if len(refused) == len(list(offered)):
        return f"none {reasons}"
    return f"not {', '.join(f'`{name}`' for name in refused)} {reasons}"


def _first_sentences(told: str) -> str:
    """The first paragraph of each part."""
    return told.split("\n\n", maxsplit=1)[0].replace("\n", " ")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(folder: Path) -> None:
    """Try everything, and write FOLDER/methods.md and the record beside the code."""
    from camserve.server.reference.trials import make_record  # noqa: PLC0415 - it loads models when it is run

    record = make_record()
    RECORD.write_text(record.to_json(), encoding="utf-8")
    (folder / "methods.md").write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()

"""`camserve methods`: every method there is, or one of them in full. Found by the light client through an entry point.

No server is asked: which methods work on a model is told by that model's card, `camserve models NAME`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from camserve.server.reference.facts import MethodFacts

__all__ = ["methods"]

_EXAMPLES = """
\b
Examples:
  camserve methods                           all of them, family by family
  camserve methods grad-cam                  its formula, parameters, profiles and models
  camserve methods "GradCAM++"               case, hyphens and spaces do not matter
  camserve methods --json | jq -r '.[] | select(.work == "A") | .slug'
  camserve models surface                    which of them work on a model of a server
"""


@click.command(epilog=_EXAMPLES)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def methods(name: str | None, as_json: bool) -> None:  # noqa: FBT001 - click's flag
    """List the methods of explanation, or show the one called NAME."""
    # Imported here: torch takes seconds, and --help should not.
    from camserve.server.cam.methods import METHODS, find_method  # noqa: PLC0415
    from camserve.server.errors import CamserveError  # noqa: PLC0415
    from camserve.server.reference.facts import facts_of  # noqa: PLC0415
    from camserve.server.reference.record import read_record  # noqa: PLC0415

    record = read_record()
    try:
        chosen = list(METHODS.values()) if name is None else [find_method(name)]
    except CamserveError as error:
        raise click.UsageError(error.message) from error
    told = [facts_of(method) for method in chosen]
    if as_json:
        entries = [{**dataclasses.asdict(facts), **record.of(facts.slug)} for facts in told]
        click.echo(json.dumps(entries if name is None else entries[0], indent=2, ensure_ascii=False))
    elif name is None:
        _show_all(told)
    else:
        _show_one(told[0], record.of(told[0].slug))


def _show_all(told: list[MethodFacts]) -> None:
    from rich.table import Table  # noqa: PLC0415

    console = _console()
    for family in dict.fromkeys(facts.family for facts in told):
        table = Table(
            "method", "title", "class", "cost", "reads", "parameters", title=family, title_justify="left", box=None
        )
        for facts in told:
            if facts.family == family:
                names = ", ".join(parameter.name for parameter in facts.parameters) or "-"
                table.add_row(facts.slug, facts.title, facts.work, facts.cost, facts.reads, names)
        console.print(table)
        console.print()
    console.print("Class A: a forward. B: also a gradient, shared with the batch. C: many passes over one row.")
    console.print("`camserve methods NAME` shows one in full.")


def _show_one(facts: MethodFacts, works: Mapping[str, Any]) -> None:
    from rich.padding import Padding  # noqa: PLC0415

    console = _console()

    def section(title: str, *lines: str) -> None:
        console.print(f"\n{title}", style="bold", markup=False)
        for line in lines:
            console.print(Padding(line, (0, 0, 0, 2)), markup=False)

    console.print(f"{facts.title} ({facts.slug})", style="bold", markup=False)
    console.print(facts.paper, markup=False)
    needs = f"; needs {', '.join(facts.needs)}" if facts.needs else ""
    section("Cost", f"class {facts.work}: {facts.cost}; reads {facts.reads}{needs}")
    section(
        "Map",
        "keeps positive evidence only, unless a spec says otherwise" if facts.rectifies else "signed",
        *(["has the input's channels, signed, unless `saliency` brings them together"] if facts.has_channels else []),
    )
    if facts.arithmetic:
        section("Arithmetic", *(part.replace("\n", " ") for part in facts.arithmetic.split("\n\n")))
    section("Parameters", *[f"{p.name} ({p.default}): {p.meaning}" for p in facts.parameters] or ["none"])
    section(
        "Profiles",
        *(
            f"{p.profile}: {p.told or 'the same as the paper'}".replace("\n\n", " ").replace("\n", " ")
            for p in facts.profiles
        ),
    )
    section("Targets", *(f"{kind}: {told}" for kind, told in works["targets"].items()))
    section("Programs", *(f"{form}: {told or 'works'}" for form, told in works["programs"].items()))


def _console() -> Console:
    from rich.console import Console  # noqa: PLC0415

    return Console(highlight=False)

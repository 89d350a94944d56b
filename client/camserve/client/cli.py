"""The `camserve` command: `explain`, `models` and `bench` here, the server's own commands found through an entry-point group."""

from __future__ import annotations

from typing import Final

import click

from camserve.client.cli_explain import explain
from camserve.client.cli_groups import CommandGroup
from camserve.client.cli_models import models

# Commands of the client that are imported when they are run: the others need not wait for what these import.
_LATER: Final = {"bench": "camserve.client.bench.command"}
_TOLD: Final = {
    "bench": "Offer load to a server and tell how it fares.",
    "demo": "Explain the sample images with the shipped model and write a report.",
    "keys": "Make, list and revoke the API keys of a server's callers.",
    "methods": "List the methods of explanation, or show one in full.",
    "serve": "Serve models over gRPC.",
}
_EXAMPLES: Final = """
\b
Examples:
  camserve serve                                       a server with the demo model on port 50051
  camserve models                                      what it serves
  camserve explain part.png --out maps                 predict and explain one image
  camserve explain photos/ -m grad-cam -m layercam --out maps
  camserve bench --rate 5,10,20                        how it fares under load
"""


@click.group(
    "camserve",
    cls=CommandGroup,
    found_in="camserve.commands",
    told=_TOLD,
    later=_LATER,
    epilog=_EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="camserve", message="%(prog)s %(version)s")
def main() -> None:
    """Explain what an image model looked at: the prediction first, then why."""


main.add_command(explain)
main.add_command(models)

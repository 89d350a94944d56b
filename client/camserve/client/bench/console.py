"""What a run shows on a terminal: progress on standard error while it goes on, tables on standard output when it is over.

`command.py` calls it. Where nobody watches there is one plain line for each finished round, and tables without colour.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

import click
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from camserve.client.bench import tables
from camserve.client.bench.document import Run
from camserve.client.bench.load import Progress
from camserve.client.bench.records import Load
from camserve.client.bench.sweep import PREDICTION, LoadResult, Plan
from camserve.client.bench.tables import Grid, milliseconds

# Tables are as wide as they need to be where they are not read on a terminal.
_PLAIN_WIDTH: Final = 200
_REFRESH_SECONDS: Final = 0.25


class Watch:
    """Shows how a sweep fares: `async with Watch(plan).shown() as watch`, with `watch.begin` for `sweep`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._console = Console(stderr=True)
        self._round = 0
        self._load: Load | None = None
        self._asked = ""
        self._progress = Progress()
        self._began = 0.0

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[Watch]:
        """Keeps a line up to date while the body runs."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(console=self._console, transient=True, auto_refresh=False) as live:
            drawing = asyncio.create_task(self._draw(live))
            try:
                yield self
            finally:
                drawing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await drawing

    def begin(self, load: Load, asked: str, progress: Progress) -> None:
        """Takes note of the next round."""
        self._round += 1
        self._load, self._asked, self._progress = load, asked, progress
        self._began = asyncio.get_running_loop().time()

    def told(self, result: LoadResult) -> None:
        """Prints what came of a load in one line."""
        figures = result.mix
        latency = figures.latency
        line = f"{figures.load}: {figures.requests_per_second:.1f} answers/s"
        if latency is not None:
            line += f", p50 {milliseconds(latency.p50)} ms, p99 {milliseconds(latency.p99)} ms"
        if figures.error_share:
            line += f", {figures.error_share:.1%} failed"
        if self._console.is_terminal:
            self._console.print(line, highlight=False)  # Above the line that is kept up to date.
        else:
            click.echo(line, err=True)

    async def _draw(self, live: Live) -> None:
        while True:
            live.update(Text(self._line(), overflow="ellipsis", no_wrap=True), refresh=True)
            await asyncio.sleep(_REFRESH_SECONDS)

    def _line(self) -> str:
        if self._load is None:
            return "connecting"
        passed = asyncio.get_running_loop().time() - self._began
        progress = self._progress
        asked = "" if self._plan.baseline is None else f" ({'predictions' if self._asked == PREDICTION else 'mix'})"
        counts = f"{progress.answered} answered, {progress.in_flight} under way"
        if progress.failed:
            counts += f", {progress.failed} failed"
        if progress.not_sent:
            counts += f", {progress.not_sent} not sent"
        return f"round {self._round} of {self._plan.round_count}: {self._load}{asked}, {passed:.0f} s, {counts}"


def show(run: Run) -> None:
    """Prints the tables of a run, and what to know before trusting them."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    card = run.card
    console.print(
        f"[bold]{escape(card.name)}[/], version {escape(card.version)}, {card.kind} on {escape(card.device)} in {card.dtype} "
        f"at {escape(run.server)}; {escape(run.source)}; {escape(tables.mix_text(run))}",
        highlight=False,
    )
    if not run.results:
        console.print("nothing was measured", highlight=False)
    for grid in tables.grids(run):
        console.print(_drawn(grid))
    for line in tables.notes(run):
        console.print(escape(line), highlight=False)


def _drawn(grid: Grid) -> Table:
    drawn = Table(title=grid.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(grid.headings):
        drawn.add_column(heading, justify="left" if index < grid.words else "right")
    for row in grid.rows:
        drawn.add_row(*map(escape, row))
    return drawn

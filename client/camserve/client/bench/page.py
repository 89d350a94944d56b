"""A run as one HTML page: `camserve bench --html FILE`. Plots are inline, tables beneath hold their numbers, nothing is loaded.

It looks as the reports of `camserve explain` do: their style sheet comes first, `page.css` adds the plots. Everything that came
from outside is escaped.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from camserve.client import pages
from camserve.client.bench import charts, tables
from camserve.client.bench.charts import Series, Spread
from camserve.client.bench.document import Run, generator_facts
from camserve.client.bench.figures import STAGES, Percentiles, StepFigures
from camserve.client.bench.records import Closed, Open
from camserve.client.bench.tables import Grid, labelled
from camserve.client.pages import text

_STAGE_NAMES: Final[Mapping[str, str]] = {"lag": "sent late", "maps": "making maps", "other": "rest of the server"}
# A bar so much longer than another hides its parts.
_HIDING: Final = 5
_FOOTER: Final = (
    "<footer>Latency counts from when a request was due to its last message; the first message is the prediction. Throughput "
    "counts full answers that ended in the window. Percentiles are nearest ranks over full answers. The time of a stage is its "
    "mean over the answers; forward and backward are those of the whole pass.</footer>"
)


def write_page(path: Path, run: Run) -> None:
    """Writes the page of a run."""
    path.write_text(page(run), encoding="utf-8")


def page(run: Run) -> str:
    """Returns the page of a run."""
    title = f"camserve bench: {run.card.name}"
    started = run.started.strftime("%Y-%m-%d %H:%M UTC")
    lead = f"{tables.mix_text(run)}; {run.source}; {run.card.device} in {run.card.dtype}; {started}"
    parts = [
        f"<h1>{text(title)}</h1>",
        f'<p class="lead">{text(lead)}</p>',
        _tiles(run),
        _notes(run),
        f'<div class="plots">{"".join(_plots(run))}</div>',
        *(_table(grid) for grid in tables.grids(run)),
        _facts("Model", _model(run)),
        _facts("Run", _settings(run)),
        _FOOTER,
    ]
    body = "\n".join(filter(None, parts))
    style = _style("camserve.client", "report.css") + _style("camserve.client.bench", "page.css")
    return pages.page(title, style, body)


def _style(package: str, name: str) -> str:
    return (importlib.resources.files(package) / name).read_text("utf-8")


def _tiles(run: Run) -> str:
    """The few figures that most readers come for."""
    answered = [result for result in run.results if result.mix.latency is not None]
    if not answered:
        return ""
    fastest = max(answered, key=lambda result: result.mix.requests_per_second)
    calmest = answered[0].mix
    made = [(f"{fastest.mix.requests_per_second:.4g}", "/s", f"most answers, at {fastest.load}")]
    if run.target_seconds is not None:
        best = max(answered, key=lambda result: result.mix.good_per_second)
        within = f"most within {_target(run)}, at {best.load}"
        made.append((f"{best.mix.good_per_second:.4g}", "/s", within))
    if calmest.latency is not None:
        made.append((tables.milliseconds(calmest.latency.p50), "ms", f"median latency at {calmest.load}"))
        made.append((tables.milliseconds(calmest.latency.p99), "ms", f"p99 at {calmest.load}"))
    if calmest.first_latency is not None:
        made.append((tables.milliseconds(calmest.first_latency.p50), "ms", "median to the prediction"))
    ratios = [(result, result.time_ratio or result.latency_ratio) for result in answered]
    told = [(result, ratio) for result, ratio in ratios if ratio is not None]
    if told:
        result, ratio = told[-1]
        what = "cost" if result.time_ratio is not None else "median latency"
        made.append((f"{ratio.median:.2f}", "x", f"the {what} of a bare prediction, at {result.load}"))
    failed = sum(result.mix.due - result.mix.answered for result in run.results)
    due = sum(result.mix.due for result in run.results)
    made.append((f"{failed / due:.1%}" if failed else "0", "", f"failed, of {due} requests"))
    tiles = "".join(
        f'<div class="tile"><b>{text(value)} <small>{text(unit)}</small></b><span>{text(name)}</span></div>'
        for value, unit, name in made
    )
    return f'<div class="tiles">{tiles}</div>'


def _notes(run: Run) -> str:
    missed = "".join(f'<p class="error">Missed: {text(line)}</p>' for line in run.missed)
    told = "".join(f'<p class="note">{text(line)}</p>' for line in tables.notes(run))
    return f'<section class="card">{told}{missed}</section>' if told or missed else ""


def _plots(run: Run) -> Iterable[str]:
    if any(result.mix.latency for result in run.results):
        yield _latency(run)
        yield _throughput(run)
        yield _distribution(run)
    if any(figures.stages for _, figures in labelled(run)):
        yield _stages(run)
    if any(result.mix.batch_rows_counts for result in run.results):
        yield _batches(run)
    if any(result.mix.due for result in run.results):
        yield _outcomes(run)


def _places(run: Run) -> list[str]:
    return [f"{result.load.value:g}" for result in run.results]


def _axis(run: Run) -> str:
    return "callers" if isinstance(run.results[0].load, Closed) else "requests due in a second"


def _latency(run: Run) -> str:
    def of(found: Percentiles | None, name: str) -> float | None:
        return None if found is None else float(getattr(found, name))

    series = [
        Series(name=name, style=name, values=[of(result.mix.latency, name) for result in run.results])
        for name in ("p99", "p90", "p50")
    ]
    if any(result.prediction for result in run.results):
        values = [of(result.prediction.latency, "p50") if result.prediction else None for result in run.results]
        series.append(Series(name="p50 of bare predictions", style="prediction", values=values))
    plot = charts.lines("Latency against load", _places(run), series, _axis(run), _time)
    return _figure("Latency", "from when a request was due to its last message", series, plot)


def _throughput(run: Run) -> str:
    def rates(of: str) -> list[float | None]:
        return [float(getattr(result.mix, of)) for result in run.results]

    series = [Series(name="full answers", style="answers", values=rates("requests_per_second"))]
    if run.target_seconds is not None:
        series.append(Series(name=f"within {_target(run)}", style="good", values=rates("good_per_second")))
    offered = [result.load.rate if isinstance(result.load, Open) else None for result in run.results]
    if any(offered):
        series.insert(0, Series(name="offered", style="offered", values=offered))
    if any(result.prediction for result in run.results):
        bare = [result.prediction.requests_per_second if result.prediction else None for result in run.results]
        series.append(Series(name="bare predictions", style="prediction", values=bare))
    plot = charts.lines("Answers in a second against load", _places(run), series, _axis(run), lambda rate: f"{rate:g}")
    return _figure("Throughput", "answers in a second", series, plot)


def _distribution(run: Run) -> str:
    rows = []
    for result in run.results:
        latency = result.mix.latency
        marks = [] if latency is None else [(latency.p50, "p50"), (latency.p90, "p90"), (latency.p99, "p99")]
        bars = [(bucket.above or bucket.up_to / 2, bucket.up_to, bucket.count) for bucket in result.mix.histogram]
        rows.append(Spread(name=str(result.load), bars=bars, marks=marks))
    plot = charts.distributions("Distribution of latency under each load", rows, _time)
    caption = "<b>Distribution of latency</b>full answers; the axis is logarithmic"
    marked = charts.legend([(name, name) for name in ("p50", "p90", "p99")])
    return f"<figure><figcaption>{caption}</figcaption>{marked}{plot}</figure>"


def _stages(run: Run) -> str:
    rows = [(name, figures) for name, figures in labelled(run) if figures.stages]

    def told(stage: str) -> list[float | None]:
        return [figures.stages[stage] for _, figures in rows]

    series = [
        Series(name=_STAGE_NAMES.get(stage, stage), style=f"stage-{stage}", values=told(stage)) for stage in STAGES
    ]
    totals = [sum(figures.stages.values()) for _, figures in rows]
    as_shares = max(totals) > _HIDING * min(totals)
    title, places = "Mean time by stage under each load", [name for name, _ in rows]
    plot = charts.bars(title, places, series, _time, as_shares=as_shares)
    about = "mean of a full answer, as shares of its time" if as_shares else "mean of a full answer"
    return _figure("Where the time goes", about, series, plot)


def _batches(run: Run) -> str:
    def counts(figures: StepFigures) -> dict[int, int]:
        return dict(figures.batch_rows_counts)

    columns = [counts(result.mix) for result in run.results]
    plot = charts.dots("Rows that shared a pass against load", _places(run), columns, _axis(run))
    caption = "<b>Batch size</b>rows of the pass an answer came from; the larger a dot, the more answers; the line is the mean"
    return f"<figure><figcaption>{caption}</figcaption>{plot}</figure>"


def _outcomes(run: Run) -> str:
    figures = [result.mix for result in run.results]
    failed = [one.due - one.answered - one.not_sent for one in figures]
    parts = [
        ("answered" if run.target_seconds is None else f"within {_target(run)}", "good", [one.good for one in figures]),
        ("later", "late", [one.answered - one.good for one in figures]),
        ("failed", "failed", failed),
        ("not sent", "unsent", [one.not_sent for one in figures]),
    ]
    series = [Series(name=name, style=style, values=values) for name, style, values in parts if any(values)]
    places = [str(result.load) for result in run.results]
    plot = charts.bars("Outcomes under each load", places, series, "{:.0f}".format, as_shares=True)
    return _figure("What became of the requests", "shares of those that fell due, and how many did", series, plot)


def _target(run: Run) -> str:
    return "" if run.target_seconds is None else f"{run.target_seconds * 1000:g} ms"


def _figure(name: str, about: str, series: Iterable[Series], plot: str) -> str:
    shown = charts.legend([(one.style, one.name) for one in series])
    return f"<figure><figcaption><b>{text(name)}</b>{text(about)}</figcaption>{shown}{plot}</figure>"


def _table(grid: Grid) -> str:
    def cells(tag: str, row: Iterable[str]) -> str:
        return "".join(
            f"<{tag}>{text(cell)}</{tag}>" if index < grid.words else f'<{tag} class="number">{text(cell)}</{tag}>'
            for index, cell in enumerate(row)
        )

    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in grid.rows)
    head = f"<thead><tr>{cells('th', grid.headings)}</tr></thead>"
    return (
        f'<section class="card"><h2>{text(grid.title)}</h2><div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
        "</section>"
    )


def _facts(title: str, facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in facts.items())
    return f'<section class="card"><h2>{text(title)}</h2><table>{rows}</table></section>'


def _model(run: Run) -> dict[str, str]:
    card = run.card
    return {
        "model": f"{card.name}, version {card.version}",
        "digest": f"sha256 {card.model_sha256}",
        "program": f"{card.kind} on {card.device} in {card.dtype}",
        "input": " x ".join(map(str, card.input.shape)),
        "passes": f"at most {card.max_batch_rows} rows",
        "default layer": card.default_layer,
    }


def _settings(run: Run) -> dict[str, str]:
    generator = generator_facts()
    machine = f"camserve {generator['camserve']}, grpcio {generator['grpcio']}, Python {generator['python']}"
    facts = {
        "server": run.server,
        "inputs": f"{run.source}, {run.source_bytes / 1000:.3g} kB each on average",
        "load generator": f"{machine}, {generator['cpus']} CPUs, {generator['platform']}",
    }
    given = {name: value for name, value in run.settings.items() if value not in (None, (), [], "", False)}
    return facts | {name.replace("_", " "): _setting(value) for name, value in given.items()}


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _time(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms" if seconds else "0"

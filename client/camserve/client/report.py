"""Results become one HTML file that a person can open, keep and send on: images inside, nothing loaded from elsewhere.

`camserve demo` calls `write_report` with real results; anyone may, with their own. Everything that came from outside is escaped.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from camserve.client.boxes import Detection
from camserve.client.errors import CamserveError
from camserve.client.figures import heatmap_figure, picture_figure
from camserve.client.pages import page, text
from camserve.client.results import ClassScore, Prediction, Result, Summary


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportEntry:
    """One image of a report.

    Attributes:
        name: heading.
        result: what the server answered; or the error, for an image that failed.
        picture: the source; None uses the one that the result remembers.
        facts: what else to tell, such as {"truth": "scratch"}.
    """

    name: str
    result: Result | CamserveError
    picture: Image.Image | None = None
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_report(
    path: str | os.PathLike[str],
    entries: Sequence[ReportEntry],
    *,
    title: str,
    server_facts: Mapping[str, str],
) -> Path:
    """Writes a report.

    Args:
        path: the HTML file; its folder is made if need be.
        entries: the images, in the order in which they are shown.
        title: heading of the page.
        server_facts: what to tell about server and model, such as {"model": "surface, version 1"}.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_page(title, server_facts, entries), encoding="utf-8")
    return target


def _page(title: str, facts: Mapping[str, str], entries: Sequence[ReportEntry]) -> str:
    style = (importlib.resources.files("camserve.client") / "report.css").read_text("utf-8")
    sections = "\n".join(_section(entry) for entry in entries)
    maps = sum(len(entry.result.heatmaps) for entry in entries if isinstance(entry.result, Result))
    body = f"""<h1>{text(title)}</h1>
<div class="card">{_facts(facts)}</div>
{sections}
<footer>{len(entries)} images, {maps} maps. Colours run from each map's smallest value to its largest; the range is told below \
each map, in units of the target's score. Signed channels stand on gray: brighter is evidence for, darker against.</footer>"""
    return page(title, style, body)


def _section(entry: ReportEntry) -> str:
    result = entry.result
    if isinstance(result, CamserveError):
        return _card(
            entry.name, "failed", picture_figure(entry.picture, "source") + _failure(str(result)) + _facts(entry.facts)
        )
    source = entry.picture or result.picture()
    figures = [picture_figure(source, "source")]
    figures += [heatmap_figure(heatmap, entry.picture) for heatmap in result.heatmaps]
    body = [
        f'<div class="maps">{"".join(figures)}</div>',
        *(_failure(f"Spec {spec_error.spec_index}: {spec_error.error}") for spec_error in result.errors),
        '<div class="columns">',
        f"<div><h3>Prediction</h3>{_prediction(result.prediction)}</div>",
        f"<div><h3>Time on the server</h3>{_timings(result.summary)}</div>",
        "</div>",
        f"<h3>Record</h3>{_facts({**entry.facts, **_record(result.summary)})}",
    ]
    return _card(entry.name, _verdict(result.prediction), "\n".join(body))


def _card(name: str, verdict: str, body: str) -> str:
    return (
        f'<section class="card"><div class="head"><h2>{text(name)}</h2><span class="verdict">{text(verdict)}</span></div>\n'
        f"{body}</section>"
    )


def _verdict(prediction: Prediction) -> str:
    """What the model said, in a few words."""
    best = prediction.best
    if isinstance(best, Detection):
        count = len(prediction.detections)
        return f"{best.name} {best.score:.1%}" + (f" and {count - 1} more" if count > 1 else "")
    if best is None:
        return f"{len(prediction.embedding)} dimensions" if prediction.embedding else "nothing found"
    if best.step is not None:
        return " ".join(item.name for item in prediction.classes)
    return f"{best.name} {_told(best)}"


def _prediction(prediction: Prediction) -> str:
    if prediction.embedding:
        length = math.sqrt(sum(value * value for value in prediction.embedding))
        return _facts({"dimensions": str(len(prediction.embedding)), "length": f"{length:.4g}"})
    rows = [
        f'<tr><th>{_heading(item)}</th><td class="wide">{_bar(item.probability)}</td>'
        f'<td class="number">{_told(item)}</td></tr>'
        for item in prediction.classes
    ]
    rows += [
        f"<tr><th>{text(item.name)}</th><td>{item.box.width} x {item.box.height} at {item.box.left}, {item.box.top}</td>"
        f'<td class="number">{item.score:.1%}</td></tr>'
        for item in prediction.detections
    ]
    return _table(rows)


def _heading(item: ClassScore) -> str:
    return text(item.name if item.step is None else f"{item.step + 1}: {item.name}")


def _told(item: ClassScore) -> str:
    """A class's probability, or a regression's value, which has none."""
    return f"{item.probability:.1%}" if item.probability else f"{item.logit:.4g}"


def _timings(summary: Summary) -> str:
    stages = dataclasses.asdict(summary.timings)
    longest = max(stages.values()) or 1.0
    return _table(
        f'<tr><th>{text(stage)}</th><td class="wide">{_bar(seconds / longest)}</td>'
        f'<td class="number">{seconds * 1000:.1f} ms</td></tr>'
        for stage, seconds in stages.items()
    )


def _record(summary: Summary) -> dict[str, str]:
    return {
        "request": summary.request_id,
        "model": f"{summary.model}, version {summary.version}, sha256 {summary.model_sha256}",
        "pass": f"{summary.batch_rows} rows, {summary.pass_explanations} explanations, {summary.plan}, "
        f"{summary.dtype} on {summary.device}",
    }


def _facts(facts: Mapping[str, str]) -> str:
    return _table(f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in facts.items())


def _table(rows: Iterable[str]) -> str:
    return f"<table>{''.join(rows)}</table>"


def _bar(share: float) -> str:
    return f'<div class="bar"><i style="width:{min(max(share, 0.0), 1.0):.1%}"></i></div>'


def _failure(message: str) -> str:
    return f'<p class="error">{text(message)}</p>'

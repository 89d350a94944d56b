"""Results become one HTML file that a person can open, keep and send on: images inside, nothing loaded from elsewhere.

`camserve demo` calls `write_report` with real results; anyone may, with their own. Everything that came from outside is escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.resources
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from camserve.client.errors import CamserveError
from camserve.client.heatmaps import Heatmap
from camserve.client.results import ClassScore, Result, Summary

# Photographs are shown at a few hundred pixels; embedding them whole would make the file too large to send.
_LARGEST_SIDE: Final = 640


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
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<div class="card">{_facts(facts)}</div>
{sections}
<footer>{len(entries)} images, {maps} maps. Colours run from each map's smallest value to its largest; the range is told below \
each map, in units of the target's score.</footer>
</body>
</html>
"""


def _section(entry: ReportEntry) -> str:
    result = entry.result
    if isinstance(result, CamserveError):
        return _card(
            entry.name, "failed", _picture(entry.picture, "source") + _failure(str(result)) + _facts(entry.facts)
        )
    source = entry.picture or result.picture()
    figures = [_picture(source, "source"), *(_heatmap(heatmap, entry.picture) for heatmap in result.heatmaps)]
    body = [
        f'<div class="maps">{"".join(figures)}</div>',
        *(_failure(f"Spec {spec_error.spec_index}: {spec_error.error}") for spec_error in result.errors),
        '<div class="columns">',
        f"<div><h3>Prediction</h3>{_prediction(result.prediction.classes)}</div>",
        f"<div><h3>Time on the server</h3>{_timings(result.summary)}</div>",
        "</div>",
        f"<h3>Record</h3>{_facts({**entry.facts, **_record(result.summary)})}",
    ]
    best = result.prediction.classes[0]
    return _card(entry.name, f"{best.name} {best.probability:.1%}", "\n".join(body))


def _card(name: str, verdict: str, body: str) -> str:
    return (
        f'<section class="card"><div class="head"><h2>{_text(name)}</h2><span class="verdict">{_text(verdict)}</span></div>\n'
        f"{body}</section>"
    )


def _heatmap(heatmap: Heatmap, picture: Image.Image | None) -> str:
    target = heatmap.target
    rank = f", {heatmap.target_index + 1} of {heatmap.target_count}" if heatmap.target_count > 1 else ""
    flags = "".join(f' <span class="flag">{_text(flag)}</span>' for flag in sorted(heatmap.flags))
    caption = (
        f"<b>{_text(heatmap.method)}</b>{flags}<br>{_text(', '.join(heatmap.layers))}<br>"
        f"why {_text(target.name)}{rank}: {_text(target.score)} {target.value:.3g}<br>"
        f"{heatmap.raw_min:.3g} to {heatmap.raw_max:.3g}"
    )
    try:
        overlay = heatmap.overlay(picture)
    except (
        CamserveError,
        ValueError,
    ) as error:  # A tensor without a picture, or a corrupt map; the others are still shown.
        return f'<figure><p class="error">{_text(str(error))}</p><figcaption>{caption}</figcaption></figure>'
    return f"<figure>{_image(overlay, f'{heatmap.method} of {target.name}')}<figcaption>{caption}</figcaption></figure>"


def _picture(picture: Image.Image | None, caption: str) -> str:
    if picture is None:
        return ""
    size = f"{picture.width} x {picture.height}"
    return f"<figure>{_image(picture, caption)}<figcaption><b>{_text(caption)}</b><br>{size}</figcaption></figure>"


def _image(picture: Image.Image, alternative: str) -> str:
    shown = picture.convert("RGB")
    shown.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    file = io.BytesIO()
    shown.save(file, "WEBP", quality=88)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="{_text(alternative)}" src="data:image/webp;base64,{data}">'


def _prediction(classes: Iterable[ClassScore]) -> str:
    return _table(
        f'<tr><th>{_text(item.name)}</th><td class="wide">{_bar(item.probability)}</td>'
        f'<td class="number">{item.probability:.1%}</td></tr>'
        for item in classes
    )


def _timings(summary: Summary) -> str:
    stages = dataclasses.asdict(summary.timings)
    longest = max(stages.values()) or 1.0
    return _table(
        f'<tr><th>{_text(stage)}</th><td class="wide">{_bar(seconds / longest)}</td>'
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
    return _table(f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in facts.items())


def _table(rows: Iterable[str]) -> str:
    return f"<table>{''.join(rows)}</table>"


def _bar(share: float) -> str:
    return f'<div class="bar"><i style="width:{min(max(share, 0.0), 1.0):.1%}"></i></div>'


def _failure(message: str) -> str:
    return f'<p class="error">{_text(message)}</p>'


def _text(value: str) -> str:
    return html.escape(str(value))

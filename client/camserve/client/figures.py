"""One map, or one picture, as an HTML figure: what `report.py` puts side by side for each image.

Maps of pictures lie over their source with the boxes of their regions, signed channels stand alone in colour, signals are drawn
as curves. Everything that came from outside is escaped, and everything shown is inside the text.
"""

from __future__ import annotations

import base64
import io
from typing import Final

import numpy as np
from PIL import Image

from camserve.client import overlays
from camserve.client.errors import CamserveError
from camserve.client.heatmaps import FloatArray, Heatmap
from camserve.client.pages import text

# Photographs are shown at a few hundred pixels; embedding them whole would make the file too large to send.
_LARGEST_SIDE: Final = 640
# Maps of a few cells are enlarged without smoothing, so that each cell can be seen.
_SMALLEST_SIDE: Final = 160
_CURVE_WIDTH: Final = 300
_CURVE_HEIGHT: Final = 120
_SHOWN_REGIONS: Final = 3


def heatmap_figure(heatmap: Heatmap, picture: Image.Image | None) -> str:
    """Returns the figure of a map; one that cannot be drawn says why, and the others are still shown.

    Args:
        heatmap: as it arrived.
        picture: to lay it over; None uses the source that was sent.
    """
    caption = _caption(heatmap)
    try:
        shown = _shown(heatmap, picture)
    except (CamserveError, ValueError) as error:  # A tensor without a picture, or a corrupt map.
        shown = f'<p class="error">{text(str(error))}</p>'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def picture_figure(picture: Image.Image | None, caption: str) -> str:
    """Returns the figure of a picture, or nothing."""
    if picture is None:
        return ""
    size = f"{picture.width} x {picture.height}"
    return f"<figure>{_image(picture, caption)}<figcaption><b>{text(caption)}</b><br>{size}</figcaption></figure>"


def _caption(heatmap: Heatmap) -> str:
    target = heatmap.target
    rank = f", {heatmap.target_index + 1} of {heatmap.target_count}" if heatmap.target_count > 1 else ""
    flags = "".join(f' <span class="flag">{text(flag)}</span>' for flag in sorted(heatmap.flags))
    lines = [
        f"<b>{text(heatmap.method)}</b>{flags}",
        text(", ".join(heatmap.layers)),
        f"why {text(target.description)}{rank}: {text(target.score)} {target.value:.3g}",
        f"{heatmap.raw_min:.3g} to {heatmap.raw_max:.3g}",
    ]
    if "partial" in heatmap.flags:
        lines.append(f"{heatmap.completed:.0%} done")
    for region in heatmap.regions[:_SHOWN_REGIONS]:
        box = region.box
        lines.append(f"{region.share:.0%} in {box.width} x {box.height} at {box.left}, {box.top}")
    if len(heatmap.regions) > _SHOWN_REGIONS:
        lines.append(f"and {len(heatmap.regions) - _SHOWN_REGIONS} more regions")
    return "<br>".join(filter(None, lines))


def _shown(heatmap: Heatmap, picture: Image.Image | None) -> str:
    alternative = f"{heatmap.method} of {heatmap.target.description}"
    if heatmap.axes[:1] == ("t",):
        return _curves(heatmap.values, alternative)
    if heatmap.axes[:1] == ("d",):
        # From the front: each row and column's largest value over the depth.
        values = heatmap.values.max(axis=(0, *range(3, heatmap.values.ndim)))
        return _image(Image.fromarray(overlays.colourise(overlays.unit_range(values))), alternative)
    if heatmap.has_channels:
        return _image(heatmap.signed_picture(), alternative)
    drawn = heatmap.overlay(picture)
    if heatmap.geometry is not None:
        drawn = overlays.outlined(drawn, [region.box for region in heatmap.regions])
    return _image(drawn, alternative)


def _curves(values: FloatArray, alternative: str) -> str:
    """A signal's map as one line for each channel, with a thin one at 0."""
    lines = values.reshape(len(values), -1).T
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    span = (high - low) or 1.0
    across = np.linspace(0, _CURVE_WIDTH, max(len(values), 2))[: len(values)]
    zero = _CURVE_HEIGHT * high / span
    drawn = []
    for line in lines:
        points = zip(across, _CURVE_HEIGHT * (high - line.astype(np.float64)) / span, strict=True)
        drawn.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"></polyline>')
    return (
        f'<svg class="curve" viewBox="0 -4 {_CURVE_WIDTH} {_CURVE_HEIGHT + 8}" role="img" aria-label="{text(alternative)}">'
        f'<line x1="0" x2="{_CURVE_WIDTH}" y1="{zero:.1f}" y2="{zero:.1f}"></line>{"".join(drawn)}</svg>'
    )


def _image(picture: Image.Image, alternative: str) -> str:
    shown = picture.convert("RGB")
    if max(shown.size) < _SMALLEST_SIDE:
        factor = _SMALLEST_SIDE // max(shown.size)
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    shown.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    file = io.BytesIO()
    shown.save(file, "WEBP", quality=88)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="{text(alternative)}" src="data:image/webp;base64,{data}">'

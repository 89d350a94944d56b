"""Draws each family's methods on two of the sample pictures: docs/pictures/<family>.png.

    python -m camserve.server.reference.pictures docs/pictures

`make docs` runs it. The shipped model is explained in this process; amplified methods get small budgets, and every random choice
has the default seed, so that the pictures come out the same. The demo model has no attention, so that family has no picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
from PIL import Image, ImageDraw, ImageFont

from camserve.client import Heatmap, Spec
from camserve.server.cam.methods import METHODS, Family, Layerwise
from camserve.server.demo.samples import SAMPLES
from camserve.server.local.explainer import LocalExplainer

__all__ = ["FAMILIES", "draw"]

FAMILIES: Final = tuple(family for family in Family if family is not Family.ATTENTION)
_PICTURES: Final = ("scratch-twill.jpg", "spot-leather.jpg")
_BUDGETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "score-cam": {"channels": 24},
    "ss-cam": {"channels": 8, "samples": 6},
    "is-cam": {"channels": 8, "steps": 5},
    "rise": {"samples": 240},
    "smoothgrad": {"samples": 12},
    "smooth-grad-cam++": {"samples": 12},
    "integrated-gradients": {"steps": 12},
    "occlusion": {"window": 24},
    "deep-feature-factorisation": {"concepts": 3},
}
_SIDE: Final = 96
_CAPTION: Final = 16
_GAP: Final = 4
_COLUMNS: Final = 6
# Few colours keep the files small; the maps' own colours are the ones that matter.
_COLOURS: Final = 56


def draw(family: Family, explainer: LocalExplainer) -> Image.Image:
    """A tile a method with its name: two pictures, one above the other; the first tile shows them as they are."""
    methods = [method for method in METHODS.values() if method.family is family]
    tiles: list[tuple[str, list[Image.Image]]] = [("source", [])]
    tiles += [(method.slug, []) for method in methods]
    for name in _PICTURES:
        for place, picture in enumerate(_row(SAMPLES / name, [method.slug for method in methods], explainer)):
            tiles[place][1].append(picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
    return _laid_out(tiles)


def _row(path: Path, slugs: Sequence[str], explainer: LocalExplainer) -> list[Image.Image]:
    result = explainer.explain(path, [_spec(slug) for slug in slugs])
    result.raise_for_errors()
    first = {heatmap.spec_index: heatmap for heatmap in reversed(result.heatmaps)}
    source = result.picture()
    if source is None:
        raise ValueError(f"{path} is no picture")
    return [source.convert("RGB"), *(_overlay(first[place]) for place in range(len(slugs)))]


def _spec(slug: str) -> Spec:
    arithmetic = METHODS[slug].arithmetic
    has_channels = not isinstance(arithmetic, Layerwise) and arithmetic.has_channels
    return Spec(slug, encoding="float32", saliency="gray" if has_channels else None, **_BUDGETS.get(slug, {}))


def _overlay(heatmap: Heatmap) -> Image.Image:
    return heatmap.overlay(opacity=0.65).convert("RGB")


def _laid_out(tiles: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    high = _CAPTION + len(_PICTURES) * _SIDE
    blocks = -(-len(tiles) // _COLUMNS)
    columns = min(_COLUMNS, len(tiles))
    sheet = Image.new("RGB", (columns * (_SIDE + _GAP) - _GAP, blocks * (high + _GAP) - _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for place, (name, pictures) in enumerate(tiles):
        left, top = place % _COLUMNS * (_SIDE + _GAP), place // _COLUMNS * (high + _GAP)
        pen.text((left, top + 1), _shortened(name, font), fill="black", font=font)
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, top + _CAPTION + row * _SIDE))
    return sheet.quantize(_COLOURS, dither=Image.Dither.NONE)


def _shortened(name: str, font: Any) -> str:
    shown = name
    while font.getlength(shown) > _SIDE:
        shown = shown[:-2].rstrip("…") + "…"
    return shown


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Write FOLDER/<family>.png for each family."""
    folder.mkdir(parents=True, exist_ok=True)
    with LocalExplainer.load(device="cpu") as explainer:
        for family in FAMILIES:
            draw(family, explainer).save(folder / f"{family.value}.png", optimize=True)


if __name__ == "__main__":
    main()

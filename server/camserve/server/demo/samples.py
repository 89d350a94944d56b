"""Pictures to try the server with: `python -m camserve.server.demo.samples`.

Arrives: nothing but two folders. Leaves: two small JPEG files per class from the test families, named like
`scratch-brushed.jpg`, and a contact sheet of every family and class for the documentation.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image

from camserve.server.demo.surfaces import LABELS, TEST_FAMILIES, TRAINING_FAMILIES, Surface, make_surface

__all__ = ["SAMPLES", "contact_sheet", "main", "samples"]

SAMPLES = Path(__file__).parent / "samples"
"""Folder of the shipped sample pictures."""

_SEED = 7
# Steps through the test families so that each class shows two and each family shows up two or three times.
_STEP = 2


def samples() -> dict[str, Surface]:
    """Makes the sample pictures.

    Returns:
        Two surfaces per class, by file name without suffix.
    """
    found = {}
    for label, name in enumerate(LABELS):
        for place in range(2):
            family = TEST_FAMILIES[(label + _STEP * place) % len(TEST_FAMILIES)]
            found[f"{name}-{family}"] = make_surface(label, family, (_SEED, label, place))
    return found


def contact_sheet() -> Image.Image:
    """Draws one picture per family and class: training families first, the test families in the last rows."""
    families = TRAINING_FAMILIES + TEST_FAMILIES
    rows = [
        np.concatenate([make_surface(label, family, (_SEED, row, label)).image for label in range(len(LABELS))], axis=1)
        for row, family in enumerate(families)
    ]
    half = len(rows) // 2
    sheet = np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], axis=1)
    return Image.fromarray(sheet).resize((sheet.shape[1] * 5 // 8, sheet.shape[0] * 5 // 8), Image.Resampling.LANCZOS)


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=SAMPLES, help="Folder for the samples."
)
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Contact sheet to write as well.")
def main(out: Path, sheet: Path | None) -> None:
    """Writes the sample pictures and, if asked, the contact sheet."""
    out.mkdir(parents=True, exist_ok=True)
    for name, surface in samples().items():
        path = out / f"{name}.jpg"
        Image.fromarray(surface.image).save(path, quality=92)
        click.echo(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet().save(sheet, quality=82, optimize=True)
        click.echo(f"{sheet}: {sheet.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

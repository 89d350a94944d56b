"""`camserve demo`: starts a server with the shipped model, explains the sample images through the real client, writes a report.

The one place where server and client meet in code: it is a caller like any other, over a socket. Nothing but the installed
package is needed, no network, no GPU.
"""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image

from camserve.client import Client, Heatmap, Result, Spec
from camserve.client.report import ReportEntry, write_report

__all__ = ["demo"]

METHODS = ("grad-cam", "layercam", "eigen-cam")

_EXAMPLES = """
\b
Examples:
  camserve demo                                  writes report/report.html
  camserve demo --out /tmp/demo -m cam -m hirescam
"""


@click.command(epilog=_EXAMPLES)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("report"), show_default=True)
@click.option("--method", "-m", "methods", multiple=True, default=METHODS, show_default=True, help="Repeatable.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also one picture: a sample a row, map beside map.",
)
def demo(out: Path, methods: tuple[str, ...], picture: Path | None) -> None:
    """Explain the sample images with the shipped model and write a report."""
    # Imported here: torch takes seconds, and --help should not.
    from camserve.server.background import BackgroundServer  # noqa: PLC0415
    from camserve.server.demo.samples import SAMPLES  # noqa: PLC0415
    from camserve.server.models.sources import demo_sources  # noqa: PLC0415
    from camserve.server.settings import Settings  # noqa: PLC0415

    try:
        specs = [Spec(method) for method in methods]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    images = sorted(path for path in SAMPLES.iterdir() if path.suffix in {".jpg", ".png"})
    settings = Settings(
        listen="127.0.0.1:0",
        metrics_listen="",
        drain_delay_seconds=0,
        log_level="warning",
        _env_prefix="CAMSERVE_DEMO_",
    )
    click.echo("Starting a server with the model 'surface' …", err=True)
    with BackgroundServer(settings, demo_sources()) as server, Client(server.target) as client:
        card = client.model("surface")
        results = list(client.explain_many(images, model="surface", specs=specs))
    for result in results:
        result.raise_for_errors()
    out.mkdir(parents=True, exist_ok=True)
    for image, result in zip(images, results, strict=True):
        for heatmap in result.heatmaps:
            heatmap.save_overlay(out / f"{image.stem}.{heatmap.method}.png")
    report = write_report(
        out / "report.html",
        [
            ReportEntry(name=image.name, result=result, facts={"truth": _truth(image)})
            for image, result in zip(images, results, strict=True)
        ],
        title="camserve: what the surface model looked at",
        server_facts={
            "model": f"{card.name}, version {card.version} ({card.kind})",
            "layer": card.default_layer,
            "device": card.device,
            "model SHA-256": card.model_sha256,
        },
    )
    if picture is not None:
        _strip(images, results).save(picture, quality=88, optimize=True)
    _print_table(images, results)
    click.echo(f"Report: {report}")


def _strip(images: list[Path], results: list[Result]) -> Image.Image:
    """One flawed sample of each kind a row: the source, then the overlay of each method."""
    rows: dict[str, list[Image.Image]] = {}
    for image, result in zip(images, results, strict=True):
        if _truth(image) not in ("good", *rows):
            with Image.open(image) as source:
                rows[_truth(image)] = [
                    source.convert("RGB"),
                    *(heatmap.overlay().convert("RGB") for heatmap in result.heatmaps),
                ]
    width, height = next(iter(rows.values()))[0].size
    strip = Image.new("RGB", (width * max(map(len, rows.values())), height * len(rows)))
    for row, pictures in enumerate(rows.values()):
        for column, drawn in enumerate(pictures):
            strip.paste(drawn.resize((width, height)), (column * width, row * height))
    return strip


def _truth(image: Path) -> str:
    return image.stem.partition("-")[0]


def _print_table(images: list[Path], results: list[Result]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    methods = [heatmap.method for heatmap in results[0].heatmaps]
    table = Table(
        "image", "answer", "", *methods, "ms", title="Answers, and the pixel (x, y) of the strongest evidence"
    )
    for image, result in zip(images, results, strict=True):
        best = result.prediction
        verdict = best.name if best.name == _truth(image) else f"{best.name}, wrong"
        milliseconds = f"{result.summary.timings.total * 1e3:.1f}"
        peaks = [_peak(heatmap) for heatmap in result.heatmaps]
        table.add_row(image.stem, verdict, f"{best.probability:.2f}", *peaks, milliseconds)
    Console().print(table)


def _peak(heatmap: Heatmap) -> str:
    """The source pixel of the map's largest value, or why there is none."""
    if heatmap.flags:
        return "/".join(sorted(heatmap.flags))
    row, column = divmod(int(heatmap.values.argmax()), heatmap.values.shape[1])
    geometry = heatmap.geometry
    if geometry is None:
        return f"({column}, {row})"
    x = geometry.scale_x * column + geometry.offset_x
    y = geometry.scale_y * row + geometry.offset_y
    return f"({x:.0f}, {y:.0f})"

"""`camserve explain`: images in, one line of JSON each out, overlays and raw maps into a folder.

The files are found first, so that no result overwrites another's; then `Client.explain_many` keeps several requests under way,
and each result is written as it comes, in the order of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from camserve.client import words
from camserve.client.cli_models import server_option, told_briefly
from camserve.client.errors import CamserveError
from camserve.client.files import STDIN, ImageFile, find_images
from camserve.client.heatmaps import Heatmap
from camserve.client.inputs import AnyInput
from camserve.client.results import Result
from camserve.client.specs import Spec, Target, TopK
from camserve.client.sync_client import Client

_EXAMPLES = """
\b
Examples:
  camserve explain part.png --out maps
  camserve explain photos/ "more/*.jpg" -m grad-cam -m layercam --out maps
  camserve explain part.png --layer layer2 --layer layer3      both fused into one map
  camserve explain part.png --target scratch                   why this class?
  camserve explain part.png --top-k 3 --out maps               one map for each of 3 classes
  cat part.png | camserve explain - | jq .prediction
"""


@click.command(epilog=_EXAMPLES)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE|FOLDER|GLOB|-...")
@server_option
@click.option("--model", help="Name of the model; may be left out when the server has only one.")
@click.option("--version", "model_version", help="Version of the model; without it the newest that is ready.")
@click.option(
    "-m", "--method", "methods", multiple=True, default=("grad-cam",), show_default=True, help="Method; repeatable."
)
@click.option("--layer", "layers", multiple=True, help="Layer; several are fused.  [default: the model card's]")
@click.option("--target", help="Class label, or class index if a number; without it the predicted class.")
@click.option("--top-k", type=click.IntRange(min=1), help="One map for each of this many best classes.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for overlays: NAME.METHOD[.RANK].png."
)
@click.option("--raw", is_flag=True, help="Also write each map's values as NAME.METHOD[.RANK].npy; needs --out.")
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True, help="Requests under way.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds for each image.",
)
def explain(
    images: tuple[str, ...],
    server: str,
    model: str | None,
    out: Path | None,
    raw: bool,  # noqa: FBT001  # click's flag.
    **options: Any,
) -> None:
    """Predict and explain images; prints one line of JSON for each.

    Folders are searched with their sub-folders. Exits with 1 when an image or an explanation failed; the others are done all the
    same.
    """
    if raw and out is None:
        raise click.UsageError("--raw needs a folder: add --out DIR")
    specs = _specs(options["methods"], options["layers"], options["target"], options["top_k"], raw=raw)
    files = find_images(images, excluded=out)
    if not files:
        raise click.UsageError(f"no images in {', '.join(images)}")
    with told_briefly(server), Client(server, timeout=options["timeout"]) as client:
        name = model or _only_model(client)
        client.model(name, options["model_version"])  # Says once, and not for each image, that there is no such model.
        version = {"version": options["model_version"]} if options["model_version"] else {}
        results = client.explain_many(
            map(_read, files), model=name, specs=specs, concurrency=options["concurrency"], on_error="return", **version
        )
        has_failed = False
        with contextlib.closing(results), _progress(len(files)) as advance:
            for file, result in zip(files, results, strict=True):
                record = _record(file, result, _writer(file, out, raw=raw) if out else None)
                click.echo(json.dumps(record, ensure_ascii=False))
                has_failed = has_failed or "error" in record or bool(record["errors"])
                advance()
    if has_failed:
        raise click.exceptions.Exit(1)


def _specs(
    methods: Iterable[str], layers: Sequence[str], target: str | None, top_k: int | None, *, raw: bool
) -> list[Spec]:
    """Returns one spec for each method; wrong words are usage errors."""
    if target is not None and top_k is not None:
        raise click.UsageError("--target and --top-k contradict each other: give one")
    about: Target = TopK(top_k) if top_k is not None else int(target) if target and target.isdecimal() else target
    # A map that is written down should be exact; one that is only looked at may be small.
    encoding = "float32" if raw else None
    try:
        specs = [Spec(method, layers=layers, target=about, encoding=encoding) for method in methods]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    # The same method twice would write the same file twice.
    return list({words.METHODS.name(spec.method): spec for spec in specs}.values())


def _only_model(client: Client) -> str:
    names = sorted({status.name for status in client.models() if status.state == "ready"})
    if len(names) != 1:
        raise click.UsageError(
            f"say which model with --model; the server has {', '.join(names) or 'none that is ready'}"
        )
    return names[0]


def _read(file: ImageFile) -> AnyInput:
    return sys.stdin.buffer.read() if file.path == STDIN else file.path


def _writer(file: ImageFile, out: Path, *, raw: bool) -> Callable[[Heatmap], dict[str, str]]:
    """Returns what writes one map's files and tells their names."""

    def write(heatmap: Heatmap) -> dict[str, str]:
        rank = f".{heatmap.target_index + 1}" if heatmap.target_count > 1 else ""
        base = out / file.stem.parent / f"{file.stem.name}.{heatmap.method}{rank}"
        base.parent.mkdir(parents=True, exist_ok=True)
        written = {"overlay": str(heatmap.save_overlay(f"{base}.png"))}
        if raw:
            np.save(f"{base}.npy", heatmap.values)
            written["raw"] = f"{base}.npy"
        return written

    return write


def _record(
    file: ImageFile, result: Result | CamserveError, write: Callable[[Heatmap], dict[str, str]] | None
) -> dict[str, Any]:
    """Writes a result's files and returns its line of JSON."""
    if isinstance(result, CamserveError):
        return {"source": file.path, "error": _error(result)}
    errors = [{"spec_index": item.spec_index, **_error(item.error)} for item in result.errors]
    heatmaps = []
    for heatmap in result.heatmaps:
        try:
            files = write(heatmap) if write else {}
        except (CamserveError, OSError, ValueError) as error:  # A corrupt map or a full disk; the next may do.
            known = error if isinstance(error, CamserveError) else CamserveError("UNKNOWN", "NOT_WRITTEN", str(error))
            errors.append({"spec_index": heatmap.spec_index, **_error(known)})
            continue
        heatmaps.append(
            {
                "method": heatmap.method,
                "layers": heatmap.layers,
                "target": dataclasses.asdict(heatmap.target),
                "flags": sorted(heatmap.flags),
                "raw_min": heatmap.raw_min,
                "raw_max": heatmap.raw_max,
                **files,
            }
        )
    return {
        "source": file.path,
        "prediction": dataclasses.asdict(result.prediction),
        "heatmaps": heatmaps,
        "errors": errors,
        "summary": dataclasses.asdict(result.summary),
    }


def _error(error: CamserveError) -> dict[str, str]:
    return {"code": error.code, "reason": error.reason, "message": error.message}


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Draws a bar on standard error if a person is watching it; yields what advances it."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console  # noqa: PLC0415  # Only people pay for it.
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("explaining", total=total)
        yield lambda: progress.advance(task)

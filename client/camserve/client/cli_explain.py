"""`camserve explain`: images in, one line of JSON each out, overlays and raw maps into a folder.

The files are found first, so that no result overwrites another's; then `Client.explain_many` keeps several requests under way,
and each result is written as it comes, in the order of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from camserve.client import words
from camserve.client.boxes import Box
from camserve.client.cli_connection import connection_options, told_briefly
from camserve.client.cli_local import client_for, local_options
from camserve.client.cli_specs import BOX, spec_options, specs
from camserve.client.errors import CamserveError
from camserve.client.files import STDIN, ImageFile, find_images
from camserve.client.heatmaps import Heatmap
from camserve.client.inputs import AnyInput, TensorInput
from camserve.client.requests import SharedOptions
from camserve.client.results import Result
from camserve.client.sync_client import Client

_EXAMPLES = """
\b
Examples:
  camserve explain part.png --out maps
  camserve explain photos/ "more/*.jpg" -m grad-cam -m layercam --out maps
  camserve explain part.png --layer layer2 --layer layer3      both fused into one map
  camserve explain part.png --target scratch                   why this class?
  camserve explain part.png --top-k 3 --out maps               one map for each of 3 classes
  camserve explain part.png --target scratch --against good    why this class rather than that?
  camserve explain part.png --polarity against --score rest    what speaks against the prediction?
  camserve explain part.png --sweep --out maps                 what each stage of the model looks at
  camserve explain part.png --regions 0.5 | jq '.heatmaps[].regions'
  camserve explain part.png -m rise --samples 500 --seed 7 --allow-partial --lane bulk
  camserve explain part.png -m smoothgrad --saliency gray --out maps
  camserve explain road.jpg --model seg --point 320,200        why this class, here?
  camserve explain road.jpg --model detector --box 40,60,120,90
  camserve explain part.png --local part.pt --labels labels.txt    without a server
  CAMSERVE_API_KEY=camserve_… camserve explain part.png --server gpu7:50051 --ca ca.pem
  cat part.png | camserve explain - | jq .prediction
"""


@click.command(epilog=_EXAMPLES)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE|FOLDER|GLOB|-...")
@connection_options
@local_options
@click.option("--model", help="Name of the model; may be left out when the server has only one.")
@click.option("--version", "model_version", help="Version of the model; without it the newest that is ready.")
@spec_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for overlays: NAME.METHOD[.LAYER][.RULE][.RANK].png.",
)
@click.option(
    "--raw", is_flag=True, help="Also write each map's values as NAME.METHOD[.LAYER][.RULE][.RANK].npy; needs --out."
)
@click.option("--roi", type=BOX, help="The part of each image to look at.")
@click.option("--lane", type=click.Choice(words.LANES.words), help="How urgent it is.")
@click.option(
    "--extra",
    "extras",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="Further input of the model, an array; repeatable.",
)
@click.option("--skip-rules", is_flag=True, help="Leave out what the rules of the model's card would add.")
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
    specs(options, None, raw=raw)  # Wrong words are told before the server is asked for the card.
    shared = _shared(options)
    files = find_images(images, excluded=out)
    if not files:
        raise click.UsageError(f"no images in {', '.join(images)}")
    with told_briefly(server, options["credentials"]), client_for(server, options) as client:
        name = model or _only_model(client)
        # Also says once, and not for each image, that there is no such model.
        card = client.model(name, options["model_version"])
        results = client.explain_many(
            map(_read, files),
            model=name,
            specs=specs(options, card, raw=raw),
            concurrency=options["concurrency"],
            on_error="return",
            **shared,
        )
        has_failed = False
        with contextlib.closing(results), _progress(len(files)) as advance:
            for file, result in zip(files, results, strict=True):
                record = _record(file, result, _writer(file, out, raw=raw, is_swept=options["sweep"]) if out else None)
                click.echo(json.dumps(record, ensure_ascii=False))
                # What a rule of the server's asked for was not this caller's wish.
                has_failed = has_failed or "error" in record or any(not error.get("rule") for error in record["errors"])
                advance()
    if has_failed:
        raise click.exceptions.Exit(1)


def _shared(options: Mapping[str, Any]) -> SharedOptions:
    """Returns what holds for all images, without what was left out."""
    shared = SharedOptions()
    if options["model_version"]:
        shared["version"] = options["model_version"]
    if options["lane"]:
        shared["lane"] = options["lane"]
    if options["roi"]:
        shared["region_of_interest"] = Box(*options["roi"])
    if options["skip_rules"]:
        shared["skip_rules"] = True
    if options["extras"]:
        shared["extra_inputs"] = dict(map(_extra, options["extras"]))
    return shared


def _extra(text: str) -> tuple[str, TensorInput]:
    name, _, path = text.partition("=")
    try:
        return name, TensorInput(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--extra {text}: give NAME=FILE.npy with an array in the file ({error})") from error


def _only_model(client: Client) -> str:
    names = sorted({status.name for status in client.models() if status.state == "ready"})
    if len(names) != 1:
        raise click.UsageError(
            f"say which model with --model; the server has {', '.join(names) or 'none that is ready'}"
        )
    return names[0]


def _read(file: ImageFile) -> AnyInput:
    return sys.stdin.buffer.read() if file.path == STDIN else file.path


def _writer(file: ImageFile, out: Path, *, raw: bool, is_swept: bool) -> Callable[[Heatmap], dict[str, str]]:
    """Returns what writes one map's files and tells their names."""

    def write(heatmap: Heatmap) -> dict[str, str]:
        rank = f".{heatmap.target_index + 1}" if heatmap.target_count > 1 else ""
        stage = f".{heatmap.layers[0]}" if is_swept and heatmap.layers else ""
        rule = f".{heatmap.rule}" if heatmap.rule else ""
        base = out / file.stem.parent / f"{file.stem.name}.{heatmap.method}{stage}{rule}{rank}"
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
    errors = [{"spec_index": item.spec_index, "rule": item.rule, **_error(item.error)} for item in result.errors]
    heatmaps = []
    for heatmap in result.heatmaps:
        try:
            files = write(heatmap) if write else {}
        except (CamserveError, OSError, ValueError) as error:  # A corrupt map or a full disk; the next may do.
            known = error if isinstance(error, CamserveError) else CamserveError("UNKNOWN", "NOT_WRITTEN", str(error))
            errors.append({"spec_index": heatmap.spec_index, **_error(known)})  # Of a rule, too: it is ours to write.
            continue
        heatmaps.append(
            {
                "method": heatmap.method,
                "layers": heatmap.layers,
                "target": dataclasses.asdict(heatmap.target),
                "flags": sorted(heatmap.flags),
                "raw_min": heatmap.raw_min,
                "raw_max": heatmap.raw_max,
                "regions": [dataclasses.asdict(region) for region in heatmap.regions],
                "completed": heatmap.completed,
                "rule": heatmap.rule,
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

"""`camserve bench`: offers load to a running server and tells how it fares.

The options become a `Plan`, the server is asked once for the model's card and once for each kind of request, so that a wrong spec
is told at once; then `sweep.py` measures, and what came is shown, written and held against the thresholds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from camserve.client.async_client import AsyncClient
from camserve.client.bench import sources
from camserve.client.bench.document import Run, document
from camserve.client.bench.kinds import KindOfRequest, parse_kind, parse_settings
from camserve.client.bench.mix import Kind, Mix, kind
from camserve.client.bench.options import bench_options
from camserve.client.bench.page import write_page
from camserve.client.bench.records import Closed, Load, Open, Window
from camserve.client.bench.sources import Source
from camserve.client.bench.sweep import PREDICTION, Plan, sweep
from camserve.client.cards import ModelCard
from camserve.client.cli_connection import connection_options, told_briefly
from camserve.client.credentials import Credentials
from camserve.client.errors import CamserveError, Unavailable
from camserve.client.requests import SharedOptions

_EXAMPLES = """
\b
Examples:
  camserve bench                                       Grad-CAM of made-up pictures, 1, 4 and 16 callers
  camserve bench photos/ -m grad-cam --concurrency 1,8,32
  camserve bench --rate 5,10,20 --target-ms 200        arrivals by chance; how many answers are in time?
  camserve bench -m grad-cam=3 -m eigen-cam=1          three of four requests ask for Grad-CAM
  camserve bench -m grad-cam@layer2,layercam@layer3    two explanations in each request
  camserve bench -m prediction=9 -m grad-cam=1         one request in ten is explained
  camserve bench --baseline                            what an explanation costs over the prediction
  camserve bench -m rise --set samples=500 --lane bulk --deadline 2
  camserve bench --json run.json --html run.html
  camserve bench --rate 20 --max-p99-ms 250 --fail-above-errors 0.01 || echo too slow
"""
_CALLERS: Final = (1, 4, 16)
_SECONDS: Final = 10.0
_PICTURE: Final = (640, 480)
_INTERRUPTED: Final = 130
_MISSED: Final = 3


@click.command(epilog=_EXAMPLES)
@click.argument("images", nargs=-1, metavar="[IMAGE|FOLDER|GLOB]...")
@connection_options
@bench_options
def bench(images: tuple[str, ...], server: str, credentials: Credentials, **options: Any) -> None:
    """Offer load to a server and tell how it fares: throughput, latency, failures, and where the time goes.

    Sends images, or pictures it makes up. In a closed loop (--concurrency) callers wait for their answers; in an open loop
    (--rate) requests fall due whether or not earlier ones were answered, and latency counts from when they were due. Several
    values are swept one after the other. Ctrl-C ends it and tells what was measured so far.

    Exits with 3 when a threshold was missed, 1 when nothing was answered, 2 for wrong usage.
    """
    try:
        kinds = _kinds(options)
        _loads(options)
        _check(images, options)
        with told_briefly(server, credentials):
            run = asyncio.run(_bench(server, credentials, images, kinds, options))
    except ValueError as error:
        if isinstance(error, CamserveError):
            raise click.ClickException(str(error)) from error
        raise click.UsageError(str(error)) from error
    _tell(run, options)


async def _bench(
    server: str,
    credentials: Credentials,
    images: Sequence[str],
    kinds: Sequence[KindOfRequest],
    options: Mapping[str, Any],
) -> Run:
    """Asks once, then sweeps."""
    from camserve.client.bench.console import Watch  # noqa: PLC0415  # rich is slow to import, and --help does without it.

    started = dt.datetime.now(dt.UTC)
    async with AsyncClient(server, timeout=options["timeout"], credentials=credentials) as client:
        card = await _card(client, options)
        source = await asyncio.to_thread(_source, images, card, options)
        shared = _shared(card, options)
        await _ask_once(client, card, kinds, source, shared)
    plan = dataclasses.replace(_plan(server, card, kinds, source, shared, options), credentials=credentials)
    run = Run(
        started=started,
        server=server,
        card=card,
        kinds=kinds,
        source=source.name,
        source_count=len(source.inputs),
        source_bytes=source.mean_bytes,
        settings={name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        | {"images": list(images)},
        target_seconds=plan.target_seconds,
    )
    with _stopped_by_ctrl_c() as stop:
        async with Watch(plan).shown() as watch:
            async for result in sweep(plan, stop, watch.begin):
                run.results.append(result)
                watch.told(result)
        run.is_complete = not stop.is_set()
    run.missed = list(_missed(run, options))
    return run


def _kinds(options: Mapping[str, Any]) -> list[KindOfRequest]:
    settings = parse_settings(options["settings"])
    return [parse_kind(text, options["layers"], settings) for text in options["methods"]]


def _loads(options: Mapping[str, Any]) -> list[Load]:
    if options["rate"] is not None:
        if options["concurrency"] is not None:
            raise click.UsageError("--concurrency and --rate contradict each other: give one")
        return [Open(rate, max_in_flight=options["max_in_flight"]) for rate in options["rate"]]
    return [Closed(callers) for callers in options["concurrency"] or _CALLERS]


def _check(images: Sequence[str], options: Mapping[str, Any]) -> None:
    given = [
        name
        for name, is_given in (
            ("images", images),
            ("--synthetic", options["synthetic"]),
            ("--tensor", options["tensor"]),
        )
        if is_given
    ]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} contradict each other: give one")
    if options["seconds"] is not None and options["requests"] is not None:
        raise click.UsageError("--seconds and --requests contradict each other: give one")
    for path in (options["json_path"], options["html_path"]):
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(
                f"{path.parent} is no folder; make it before the run, not after"
            )  # An hour may lie between.


async def _card(client: AsyncClient, options: Mapping[str, Any]) -> ModelCard:
    name = options["model"]
    if not name:
        names = sorted({status.name for status in await client.models() if status.state == "ready"})
        if len(names) != 1:
            raise click.UsageError(
                f"say which model with --model; the server has {', '.join(names) or 'none that is ready'}"
            )
        (name,) = names
    return await client.model(name, options["model_version"])


def _source(images: Sequence[str], card: ModelCard, options: Mapping[str, Any]) -> Source:
    if images:
        return sources.from_files(images)
    takes_pictures = len(card.input.shape) in {0, 3}
    if options["tensor"] or (options["synthetic"] is None and not takes_pictures):
        return sources.tensors(card, options["input_count"], options["seed"])
    width, height = options["synthetic"] or _PICTURE
    return sources.synthetic(width, height, options["input_count"], options["seed"])


def _shared(card: ModelCard, options: Mapping[str, Any]) -> SharedOptions:
    """Returns what holds for all requests."""
    shared = SharedOptions()
    if options["model_version"]:
        shared["version"] = options["model_version"]
    if options["lane"]:
        shared["lane"] = options["lane"]
    if options["deadline"]:
        shared["deadline"] = options["deadline"]
    if card.extra_inputs:
        shared["extra_inputs"] = sources.extra_inputs(card, options["seed"])
    return shared


async def _ask_once(
    client: AsyncClient, card: ModelCard, kinds: Sequence[KindOfRequest], source: Source, shared: SharedOptions
) -> None:
    """Sends each kind of request once, so that what cannot be answered is told now and not ten thousand times."""
    patient = shared.copy()
    patient.pop("deadline", None)  # The first request of a kind may be slow; what the deadline does is measured later.
    for asked in kinds:
        try:
            (await client.explain(source.first, model=card.name, specs=asked.specs, **patient)).raise_for_errors()
        except Unavailable:
            raise
        except CamserveError as error:
            raise click.ClickException(f"the server refuses to answer {asked.name}: {error}") from error


def _plan(
    server: str,
    card: ModelCard,
    kinds: Sequence[KindOfRequest],
    source: Source,
    shared: SharedOptions,
    options: Mapping[str, Any],
) -> Plan:
    def mix(*made: Kind) -> Mix:
        return Mix(kinds=made, inputs=source.inputs)

    target = options["target_ms"] / 1000 if options["target_ms"] else options["deadline"]
    seconds = None if options["requests"] else options["seconds"] or _SECONDS
    return Plan(
        target=server,
        mix=mix(*(kind(card.name, item.specs, name=item.name, weight=item.weight, **shared) for item in kinds)),
        baseline=mix(kind(card.name, [], name=PREDICTION, **shared)) if options["has_baseline"] else None,
        loads=tuple(_loads(options)),
        window=Window(seconds=seconds, requests=options["requests"], warm_up_seconds=options["warm_up"]),
        rounds=options["rounds"],
        connections=options["connections"],
        timeout_seconds=options["timeout"],
        target_seconds=target,
        seed=options["seed"],
    )


@contextlib.contextmanager
def _stopped_by_ctrl_c() -> Iterator[asyncio.Event]:
    """Sets an event at the first Ctrl-C; the second ends the program as usual."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, interrupted)
    except (NotImplementedError, RuntimeError, ValueError):
        # Outside the main thread, and on Windows, there are no handlers: Ctrl-C then ends the program at once.
        yield stop
        return
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _missed(run: Run, options: Mapping[str, Any]) -> Iterator[str]:
    """Yields each threshold that was missed, in words."""
    most_errors, most_p99 = options["fail_above_errors"], options["max_p99_ms"]
    for result in run.results:
        figures, load = result.mix, result.load
        if most_errors is not None and figures.error_share > most_errors:
            yield f"{load}: {figures.error_share:.2%} failed, more than {most_errors:.2%}"
        if most_p99 is not None and figures.latency is None:
            yield f"{load}: nothing was answered, so that no p99 is within {most_p99:g} ms"
        elif most_p99 is not None and figures.latency is not None and figures.latency.p99 * 1000 > most_p99:
            yield f"{load}: p99 is {figures.latency.p99 * 1000:.1f} ms, more than {most_p99:g} ms"


def _tell(run: Run, options: Mapping[str, Any]) -> None:
    """Prints and writes a run, and exits with what came of it."""
    from camserve.client.bench.console import show  # noqa: PLC0415  # As above.

    show(run)
    if options["json_path"] is not None:
        options["json_path"].write_text(json.dumps(document(run), indent=2) + "\n", encoding="utf-8")
    if options["html_path"] is not None:
        write_page(options["html_path"], run)
    for line in run.missed:
        click.echo(f"missed: {line}", err=True)
    if not run.is_complete:
        raise click.exceptions.Exit(_INTERRUPTED)
    if run.missed:
        raise click.exceptions.Exit(_MISSED)
    if not any(result.mix.answered for result in run.results):
        raise click.ClickException("nothing was answered")

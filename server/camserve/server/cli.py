"""`camserve serve`: flags to settings to app, and signals to drain. Found by the light client through an entry point."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["serve"]

_EXAMPLES = """
\b
Examples:
  camserve serve                                        the shipped demo model
  camserve serve --model part=part.pt --size 224 --labels labels.txt
  camserve serve --model torchvision:resnet50           pretrained weights, needs a network
  camserve serve --model torchvision:resnet50 --random-weights 0
  camserve serve --models /srv/models --max-batch-rows 32 --log-format json
  camserve serve --listen 0.0.0.0:50051 --callers callers.toml --tls-certificate server.pem --tls-key server.key
  camserve serve --config camserve.toml --print-config  what would be set, and by whom

Every setting can also be given as CAMSERVE_<NAME> or in the file named by --config.
"""


@click.command(epilog=_EXAMPLES)
@click.option(
    "--models", "repository", type=click.Path(path_type=Path, file_okay=False), help="Model repository folder."
)
@click.option(
    "--model", "models", multiple=True, metavar="[NAME=]FILE|FACTORY", help="A model without a repository; repeatable."
)
@click.option("--size", type=click.IntRange(min=1), help="Input height and width for --model, pixels.  [default: 224]")
@click.option(
    "--labels",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Class labels for --model, one a line.",
)
@click.option(
    "--random-weights", "random_seed", type=int, metavar="SEED", help="Random weights for factories, for benchmarks."
)
@click.option(
    "--compile",
    "is_compiled",
    is_flag=True,
    help="Compile explanations of --model in the background; needs a C++ compiler.",
)
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file of settings.")
@click.option("--listen", help="Address for gRPC.  [default: 127.0.0.1:50051]")
@click.option(
    "--callers",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of API keys and client certificates; see `camserve keys`.",
)
@click.option(
    "--tls-certificate", type=click.Path(path_type=Path, dir_okay=False), help="The server's certificate, PEM."
)
@click.option("--tls-key", type=click.Path(path_type=Path, dir_okay=False), help="File of its private key, PEM.")
@click.option(
    "--tls-client-ca",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Authorities of clients, PEM: asks each for a certificate.",
)
@click.option(
    "--allow-anonymous", is_flag=True, default=None, help="Let callers without credentials explain, from anywhere."
)
@click.option("--metrics-listen", help="Address for the metrics page; empty for none.  [default: 0.0.0.0:8002]")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option("--max-batch-rows", type=int, help="Most rows in one pass.  [default: 16]")
@click.option("--max-requests", type=int, help="Most requests held at once.  [default: 256]")
@click.option("--drain-delay-seconds", type=float, help="Pause between not ready and refusing.  [default: 5]")
@click.option("--drain-seconds", type=float, help="Time to finish accepted requests.  [default: 30]")
@click.option("--log-format", type=click.Choice(["console", "json"]), help="[default: console]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
@click.option("--print-config", is_flag=True, help="Show every setting, its value and where it comes from, and exit.")
@click.option("--json", "as_json", is_flag=True, help="With --print-config: as JSON.")
def serve(  # noqa: PLR0913 - each is a flag of its own.
    *,
    models: tuple[str, ...],
    size: int | None,
    labels: Path | None,
    random_seed: int | None,
    is_compiled: bool,
    config: Path | None,
    print_config: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Serve explanations of image models over gRPC."""
    if as_json and not print_config:
        raise click.UsageError("--json belongs to --print-config; logs become JSON by --log-format json")
    if print_config:
        _print_config(config, flags, as_json=as_json)
        return
    # Imported here: --help should not wait for pydantic, nor a mistyped flag for torch, which takes seconds.
    from camserve.server.logs import configure_logs, let_go_of_stderr  # noqa: PLC0415
    from camserve.server.models.sources import demo_sources, from_flag, scan_repository  # noqa: PLC0415
    from camserve.server.settings import complaint, load_settings  # noqa: PLC0415

    try:
        settings = load_settings(config, **flags)
        sources = [
            from_flag(text, size=size, labels=labels, random_seed=random_seed, is_compiled=is_compiled)
            for text in models
        ]
        if settings.repository is not None:
            sources += scan_repository(settings.repository)
        from camserve.server.app import App  # noqa: PLC0415

        app = App(settings, sources or demo_sources())
    except ValueError as error:
        raise click.ClickException(complaint(error)) from error
    configure_logs(settings.log_format, settings.log_level)
    status = asyncio.run(_serve(app))
    let_go_of_stderr()
    sys.exit(status)


def _tell(line: str) -> None:
    """Says something to whoever started us; if they no longer listen, the serving goes on."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


def _print_config(config: Path | None, flags: dict[str, Any], *, as_json: bool) -> None:
    from camserve.server.settings import complaint, load_sourced_settings  # noqa: PLC0415
    from camserve.server.settings_page import json_page, toml_page  # noqa: PLC0415

    spelled = {str(option.name): option.opts[0] for option in click.get_current_context().command.params}
    try:
        sourced = load_sourced_settings(config, **flags)
    except ValueError as error:
        raise click.ClickException(complaint(error)) from error
    click.echo(json_page(sourced, spelled) if as_json else toml_page(sourced, spelled))


async def _serve(app: Any) -> int:
    """Runs until SIGTERM or SIGINT; a second signal ends the process at once. Returns the exit status."""
    from camserve.server.logs import let_go_of_stderr  # noqa: PLC0415 - as in `serve`

    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if asked_to_stop.is_set():
            os._exit(128 + number)
        asked_to_stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await app.start()
    except (OSError, RuntimeError) as error:
        _tell(f"Error: cannot listen: {error}")
        return 1
    loading = asyncio.create_task(app.load())
    ending = {asyncio.create_task(asked_to_stop.wait()), asyncio.create_task(app.broken.wait())}
    await asyncio.wait({loading, *ending}, return_when=asyncio.FIRST_COMPLETED)
    status = 0
    if loading.done() and not asked_to_stop.is_set():
        # What torch and the models hold is hundreds of thousands of objects: each full collection would stop every request for
        # a quarter of a second to look at them again.
        gc.collect()
        gc.freeze()
        slots = app.repository.slots()
        ready = [slot.name for slot in slots if slot.served is not None]
        if ready:
            listen = app.settings.listen
            where = listen if listen.startswith("unix:") else f"port {app.port}"
            _tell(f"camserve is ready on {where} with {', '.join(ready)}; metrics on port {app.metrics_port}")
            await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        else:
            _tell("Error: no model could be loaded: " + "; ".join(f"{s.name}: {s.error}" for s in slots))
            status = 1
    if app.broken.is_set():
        status = 1
    for waiting in ending:
        waiting.cancel()
    if not await app.drain():
        # Python would wait for the device thread, which may hang in foreign code for as long as it likes.
        let_go_of_stderr()
        os._exit(status)
    await loading
    gc.unfreeze()
    return status

"""The options of every command that asks a server: where it is, and with which credentials.

The command gets `server` and `credentials`. Errors are told in one line.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from camserve.client.credentials import Credentials
from camserve.client.errors import CamserveError, Unavailable

__all__ = ["connection_options", "told_briefly"]

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_OPTIONS: Final = (
    click.option(
        "--server", default="localhost:50051", show_default=True, metavar="HOST:PORT", envvar="CAMSERVE_SERVER",
        show_envvar=True, help="Address of the server.",
    ),
    click.option(
        "--api-key", metavar="KEY", envvar="CAMSERVE_API_KEY", show_envvar=True,
        help="Who you are; better in the variable, since command lines can be read by others.",
    ),
    click.option(
        "--token", metavar="JWT", envvar="CAMSERVE_TOKEN", show_envvar=True, help="Likewise, for servers that take tokens."
    ),
    click.option(
        "--tls", is_flag=True, envvar="CAMSERVE_TLS", show_envvar=True, help="Encrypt, and trust the system's authorities."
    ),
    click.option("--ca", type=_FILE, envvar="CAMSERVE_CA", show_envvar=True, help="Encrypt, and trust these, PEM."),
    click.option(
        "--certificate", type=_FILE, envvar="CAMSERVE_CERTIFICATE", show_envvar=True, help="Show this to the server, PEM."
    ),
    click.option("--key", type=_FILE, envvar="CAMSERVE_KEY", show_envvar=True, help="Private key of --certificate, PEM."),
)  # fmt: skip


def connection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which takes `server` and `credentials`."""

    @functools.wraps(command)
    def connected(
        *arguments: Any,
        api_key: str | None,
        token: str | None,
        tls: bool,
        ca: Path | None,
        certificate: Path | None,
        key: Path | None,
        **options: Any,
    ) -> Any:
        try:
            credentials = Credentials(
                # An empty variable is none.
                api_key=api_key or None, token=token or None, tls=tls, ca=ca, certificate=certificate, key=key
            )  # fmt: skip
            if credentials.uses_tls:
                credentials.channel_credentials()  # Reads the files, so that a wrong one is not taken for a server that is away.
        except (OSError, ValueError) as error:
            raise click.UsageError(str(error)) from error
        return command(*arguments, credentials=credentials, **options)

    for option in reversed(_OPTIONS):
        connected = option(connected)
    return connected


@contextlib.contextmanager
def told_briefly(server: str, credentials: Credentials) -> Iterator[None]:
    """Turns errors into one line and exit status 1."""
    try:
        yield
    except Unavailable as error:
        if error.reason:  # A camserve answered: it is draining or loading.
            raise click.ClickException(str(error)) from error
        why = _cause(error.message)
        raise click.ClickException(f"no camserve at {server} ({why}); {_advice(why, credentials)}") from error
    except CamserveError as error:
        raise click.ClickException(str(error)) from error


def _cause(message: str) -> str:
    """The innermost of gRPC's layers; after a handshake that failed there is an OK behind it."""
    if "WRONG_VERSION_NUMBER" in message:
        return "it speaks no TLS"
    return message.removesuffix(": OK").rsplit(": ", 1)[-1]


def _advice(why: str, credentials: Credentials) -> str:
    """What to look at: gRPC says the same of a server that is away and of one that speaks TLS otherwise than we do."""
    start = "start one with `camserve serve`"
    if credentials.uses_tls:
        shown = "" if credentials.certificate else ", or does it ask for --certificate and --key"
        return (
            f"{start}, or if one is there: does it speak TLS, is its certificate for this name and by an authority that is "
            f"trusted (--ca){shown}?"
        )
    return (
        start
        if why == "Connection refused"
        else f"{start}, or if one is there: does it speak TLS? Then give --ca or --tls"
    )

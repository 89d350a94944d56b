"""`camserve keys`: makes, lists and revokes API keys in a file of callers, which a running server reads again by itself.

Found by the light client through an entry point. The file is replaced as a whole, so that no server reads half of it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from camserve.server.callers.api_keys import digest_of, new_key
from camserve.server.callers.caller import Role, name_complaint
from camserve.server.callers.caller_file import KeyEntry, read_caller_file
from camserve.server.callers.key_writing import with_key, without_keys
from camserve.server.callers.unreadable import unreadable

__all__ = ["keys"]

_EXAMPLES = """
\b
Examples:
  camserve keys add line-3 --role explain --file callers.toml
  camserve keys add ops --role explain --role admin --expires 90d --file callers.toml
  CAMSERVE_API_KEY=$(camserve keys add me --role explain --file callers.toml) camserve models --server gpu7:50051
  camserve keys list --file callers.toml
  camserve keys revoke line-3 --file callers.toml            all keys of that name
  camserve keys revoke line-3 --id 3f9a0c11 --file callers.toml
  camserve serve --callers callers.toml                      a running server follows the file

To change a key without a gap, add a second one of the same name, hand it out, and revoke the first by its id.
"""
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_ID_LETTERS = 8


class _Moment(click.ParamType):  # type: ignore[type-arg]  # Generic in click's newest only.
    """A time from now, such as 90d, or a date."""

    name = "90d|DATE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> dt.datetime | object:
        """Returns the moment, in UTC where nothing else is said."""
        if not isinstance(value, str):
            return value
        now = dt.datetime.now(dt.UTC).replace(microsecond=0)
        if span := re.fullmatch(r"(\d{1,4})([mhdw])", value):
            return now + dt.timedelta(**{_UNITS[span[2]]: int(span[1])})
        try:
            moment = dt.datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time; write 90d, 12h, 2027-01-31 or 2027-01-31T12:00:00Z", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


_file = click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    envvar="CAMSERVE_CALLERS",
    show_envvar=True,
    help="File of callers.",
)


@click.group(epilog=_EXAMPLES)
def keys() -> None:
    """Make, list and revoke the API keys of a server's callers."""


@keys.command()
@click.argument("name")
@click.option(
    "--role",
    "roles",
    type=click.Choice([role.value for role in Role]),
    multiple=True,
    required=True,
    help="What it may do; repeatable.",
)
@click.option("--expires", type=_Moment(), help="Until when it is valid; without it for ever.")
@click.option("--not-before", type=_Moment(), help="From when on it is valid.")
@_file
def add(
    name: str,
    roles: tuple[str, ...],
    expires: dt.datetime | None,
    not_before: dt.datetime | None,
    path: Path,
) -> None:
    """Make a key for the caller NAME, and print it.

    This once: only its hash is kept in the file.
    """
    if complaint := name_complaint(name):
        raise click.UsageError(complaint)
    if expires is not None and not_before is not None and expires <= not_before:
        raise click.UsageError("--expires is not after --not-before: this key would never be valid")
    if expires is not None and expires <= dt.datetime.now(dt.UTC):
        raise click.UsageError(f"--expires {expires.isoformat()} is over: this key would never be valid")
    key = new_key()
    entry = KeyEntry(
        name=name,
        sha256=digest_of(key),
        roles=frozenset(map(Role, roles)),
        not_before=not_before,
        expires=expires,
    )
    with _changing(path) as text:
        _replace(path, with_key(text, entry))
    click.echo(f"{name} has a new key, id {_id_of(entry)}, in {path}. It is shown this once:", err=True)
    click.echo(key)


@keys.command("list")
@_file
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_keys(path: Path, as_json: bool) -> None:  # noqa: FBT001  # click's flag.
    """List the keys: name, id, roles, and whether they are valid now."""
    with _told():
        entries = read_caller_file(path.read_bytes()).key
    now = dt.datetime.now(dt.UTC)
    rows = [
        {
            "name": entry.name,
            "id": _id_of(entry),
            "roles": sorted(entry.roles),
            "not_before": entry.not_before.isoformat() if entry.not_before else None,
            "expires": entry.expires.isoformat() if entry.expires else None,
            "state": _state(entry, now),
        }
        for entry in entries
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        until = f", expires {row['expires']}" if row["expires"] else ""
        since = f", not before {row['not_before']}" if row["not_before"] else ""
        click.echo(f"{row['name']}  {row['id']}  {','.join(row['roles'])}  {row['state']}{since}{until}")  # type: ignore[arg-type]  # a list


@keys.command()
@click.argument("name")
@click.option("--id", "key_id", help="Of the one key that is meant, as `camserve keys list` shows it.")
@_file
def revoke(name: str, key_id: str | None, path: Path) -> None:
    """Take the keys of the caller NAME out of the file.

    From then on they open nothing; a running server follows within a second.
    """
    with _changing(path) as text:
        entries = [entry for entry in read_caller_file(text.encode()).key if entry.name == name]
        leaving = [entry for entry in entries if key_id is None or _id_of(entry) == key_id]
        if not leaving:
            known = ", ".join(map(_id_of, entries))
            raise click.ClickException(
                f"{name!r} has no key {key_id}; it has {known}" if known else f"{path} has no key of {name!r}"
            )
        _replace(path, without_keys(text, frozenset(entry.sha256 for entry in leaving)))
    click.echo(f"revoked: {name}, id {', '.join(map(_id_of, leaving))}", err=True)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[str]:
    """The file's text, while nobody else changes it from here; a file that is not there yet is empty."""
    with _told():
        folder = os.open(path.absolute().parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield path.read_text(encoding="utf-8") if path.exists() else ""
        finally:
            os.close(folder)


def _replace(path: Path, text: str) -> None:
    """Puts a whole new file into its place, with the rights of the old one; a new one is for its owner alone."""
    target = path.resolve()
    before = target.stat() if target.exists() else None
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            if before is not None:
                os.fchmod(file.fileno(), before.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.ClickException(unreadable(error)) from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _id_of(entry: KeyEntry) -> str:
    return entry.sha256[:_ID_LETTERS]


def _state(entry: KeyEntry, now: dt.datetime) -> str:
    if entry.expires is not None and now >= entry.expires:
        return "expired"
    return "not yet valid" if entry.not_before is not None and now < entry.not_before else "valid"

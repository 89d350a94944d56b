"""Every example of docs/security.md, as it is written but for ports: commands, files and Python."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from support.credentials import Pair, authority, ec_key, jwks, server_pair, token

from camserve.client import Client, Unauthenticated
from camserve.client.cli import main
from camserve.server.background import BackgroundServer
from camserve.server.callers.caller_file import read_caller_file
from camserve.server.callers.command import keys
from camserve.server.cli import serve
from camserve.server.settings import Settings, load_settings

PAGE = (Path(__file__).resolve().parents[2] / "docs/security.md").read_text(encoding="utf-8")
USED = {
    "API keys": ["sh", "sh", "python", "toml"],
    "Tokens": ["sh", "toml", "python"],
    "TLS": ["sh", "sh", "sh"],
    "Mutual TLS": ["sh", "toml", "python"],
    "Everybody": ["sh"],
}


def blocks(title: str) -> list[tuple[str, str]]:
    """Language and text of each example of a section."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def example(title: str, language: str, index: int = 0) -> str:
    """One of them."""
    return [text for found, text in blocks(title) if found == language][index]


def command(line: str, **environment: str) -> Result:
    """Runs a `camserve` command."""
    words = shlex.split(line)[1:]
    group: click.Command = main
    if words[0] == "keys":
        group, words = keys, words[1:]
    return CliRunner().invoke(group, words, env=environment)


@contextlib.contextmanager
def started(line: str, **changes: object) -> Iterator[BackgroundServer]:
    """What a `camserve serve` line would start, on a free port and without a model."""
    flags = serve.make_context("serve", shlex.split(line)[2:]).params
    config = flags.pop("config")
    given = {name: value for name, value in flags.items() if name in Settings.model_fields}
    settings = load_settings(config, **given)
    moved = {
        "listen": settings.listen.replace(":50051", ":0"),
        "metrics_listen": "",
        "drain_delay_seconds": 0.0,
        "log_level": "error",
        **changes,
    }
    with BackgroundServer(settings.model_copy(update=moved), ()) as server:
        yield server


def run(text: str, server: BackgroundServer, **names: object) -> None:
    """Runs Python that asks gpu7."""
    assert "gpu7:50051" in text
    exec(text.replace("gpu7:50051", f"localhost:{server.app.port}"), names)  # noqa: S102 - the page's own text


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> Pair:
    """The files that the page speaks of, where its commands are run; the authority that signed them."""
    monkeypatch.chdir(tmp_path)
    signs = authority()
    server_pair(signs).write(tmp_path, "server")
    Pair("me", signed_by=signs, uris=["spiffe://plant/line-3"]).write(tmp_path, "me")
    for name in ("ca.pem", "clients-ca.pem"):
        Path(name).write_bytes(signs.certificate)
    return signs


def lines(title: str, index: int = 0) -> list[str]:
    """The lines of a section's shell example."""
    return example(title, "sh", index).strip().splitlines()


def test_each_example_is_run_by_a_test_here():
    """A new one needs a line above, and its test."""
    assert USED == {title: [language for language, _ in blocks(title)] for title in re.findall("^## (.*)$", PAGE, re.MULTILINE)
                    if blocks(title)}  # fmt: skip


def made_keys() -> str:
    """Runs the commands that make keys, and returns the first."""
    *commands, _ = lines("API keys")
    results = [command(line) for line in commands]
    assert [0, 0, 0] == [result.exit_code for result in results]
    assert {"line-3", "ops"} == {entry.name for entry in read_caller_file(Path("callers.toml").read_bytes()).key}
    return results[0].stdout.strip()


def test_api_keys():
    """Made, listed, used from the shell, and revoked; the file by hand is one."""
    key = made_keys()
    export, models = lines("API keys", 1)
    variable = export.removeprefix("export ").partition("=")[0]

    with started(lines("API keys")[-1]) as server:
        assert 0 == command(models, CAMSERVE_SERVER=server.target, **{variable: key}).exit_code
        assert "CREDENTIALS_MISSING" in command(models, CAMSERVE_SERVER=server.target).output

    revoke = re.search(r"`(camserve keys revoke [^`]*)`", PAGE)
    assert revoke is not None
    assert 0 == command(revoke[1]).exit_code
    assert ["ops"] == [entry.name for entry in read_caller_file(Path("callers.toml").read_bytes()).key]
    assert ["line-3"] == [entry.name for entry in read_caller_file(example("API keys", "toml").encode()).key]


def test_tokens():
    """The configuration as it stands, and a token of that issuer from Python and the shell."""
    key = ec_key()
    Path("issuer.jwks.json").write_text(jwks(one=key))
    Path("camserve.toml").write_text(example("Tokens", "toml"))
    signed = token(key, aud="camserve")
    tls = {"tls_certificate": Path("server.pem"), "tls_key": Path("server.key")}

    with started(lines("Tokens")[0]) as server:
        assert 0 == command("camserve models", CAMSERVE_SERVER=server.target, CAMSERVE_TOKEN=signed).exit_code
    with started(lines("Tokens")[0], **tls) as server:
        run(example("Tokens", "python"), server, read_token=lambda: signed)


def test_tls():
    """Certificates as OpenSSL makes them, a public address with keys; the shell trusts the authority, and so does Python."""
    made = ["sh", "-e", "-c", example("TLS", "sh")]
    subprocess.run(made, check=True, capture_output=True)  # noqa: S603 - the page's own text
    key = made_keys()
    export, models = lines("TLS", 2)
    variable, _, value = export.removeprefix("export ").partition("=")

    with started(lines("TLS", 1)[0]) as server:
        line = models.replace("gpu7:50051", f"localhost:{server.app.port}")
        assert line != models
        assert 0 == command(line, CAMSERVE_API_KEY=key, **{variable: value}).exit_code
        assert "no camserve at" in command(line, CAMSERVE_API_KEY=key).output
        run(example("API keys", "python"), server, key=key)


def test_mutual_tls():
    """With and without a file of callers."""
    with started(lines("Mutual TLS")[0]) as server:
        run(example("Mutual TLS", "python"), server)
        line = f"camserve models --server localhost:{server.app.port}"
        shown = {"CAMSERVE_CA": "ca.pem", "CAMSERVE_CERTIFICATE": "me.pem", "CAMSERVE_KEY": "me.key"}
        assert 0 == command(line, **shown).exit_code
    Path("callers.toml").write_text(example("Mutual TLS", "toml"))
    with started(lines("Mutual TLS")[0], callers=Path("callers.toml")) as server:
        run(example("Mutual TLS", "python"), server)


def test_everybody():
    """Explains to whoever comes, and loads for nobody."""
    with started(lines("Everybody")[0]) as server, Client(server.target) as client:
        assert () == client.models()
        with pytest.raises(Unauthenticated):
            client.load_model("surface")

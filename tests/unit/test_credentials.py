"""From settings to what knows callers: what stops the start, and in which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.credentials import authority, ec_key, key_entry, private_pem, server_pair

from camserve.server.callers import Role
from camserve.server.cli import serve
from camserve.server.credentials import credentials_of
from camserve.server.settings import load_settings


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Good files of every kind, in the folder where the server is started, and some bad ones."""
    monkeypatch.chdir(tmp_path)
    signs = authority()
    server_pair(signs).write(tmp_path, "server")
    server_pair(signs, "other").write(tmp_path, "other")
    (tmp_path / "ca.pem").write_bytes(signs.certificate)
    (tmp_path / "callers.toml").write_text(key_entry("a", ["explain"])[1])
    (tmp_path / "broken.toml").write_text("[[key]]\nname = 3\n")
    (tmp_path / "private.pem").write_bytes(private_pem(ec_key()))
    return tmp_path


REFUSED = {
    "public": (["--listen", "0.0.0.0:0"], "nothing says who may call"),
    "public with TLS": (
        ["--listen", "[::]:0", "--tls-certificate", "server.pem", "--tls-key", "server.key"],
        "nothing says who may call",
    ),
    "public with keys": (["--listen", "0.0.0.0:0", "--callers", "callers.toml"], "without TLS"),
    "no file": (["--callers", "absent.toml"], "callers: absent.toml: No such file or directory"),
    "broken file": (["--callers", "broken.toml"], r"callers: broken.toml: key\[0\].name: .*string"),
    "half a pair": (["--tls-certificate", "server.pem"], "come together"),
    "another's key": (["--tls-certificate", "server.pem", "--tls-key", "other.key"], "tls_key belongs to another"),
    "key for certificate": (
        ["--tls-certificate", "server.key", "--tls-key", "server.key"],
        "tls_certificate is no PEM",
    ),
    "certificate for key": (["--tls-certificate", "server.pem", "--tls-key", "server.pem"], "tls_key is no PEM"),
    "no authority": (
        ["--tls-certificate", "server.pem", "--tls-key", "server.key", "--tls-client-ca", "callers.toml"],
        "tls_client_ca is no PEM",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_open_or_broken_does_not_start(files, name):
    """Exit status 1 and one complaint, in which no key is."""
    flags, why = REFUSED[name]

    result = CliRunner().invoke(serve, [*flags, "--metrics-listen", ""])

    assert 1 == result.exit_code
    assert re.search(why, result.output, re.DOTALL), result.output
    assert (files / "server.key").read_text().splitlines()[1] not in result.output


def test_a_private_key_verifies_no_tokens(files):
    """It has no business on this machine, and is not shown."""
    with pytest.raises(ValueError, match=r"jwt_keys: .*private.pem: .*no public key"):
        credentials_of(load_settings(jwt_keys=files / "private.pem", jwt_audience="camserve"))


EVERYTHING, EXPLAIN, NOTHING = frozenset(Role), frozenset({Role.EXPLAIN}), frozenset[Role]()


@pytest.mark.parametrize(
    ("listen", "knows", "allowed", "roles"),
    [
        ("127.0.0.1:0", False, False, EVERYTHING),
        ("127.0.0.1:0", True, False, NOTHING),
        ("127.0.0.1:0", True, True, EXPLAIN),
        ("unix:/run/socket", False, False, EVERYTHING),
        ("0.0.0.0:0", False, True, EXPLAIN),
        ("0.0.0.0:0", True, True, EXPLAIN),
        ("0.0.0.0:0", True, False, NOTHING),
    ],
)
def test_what_anonymous_callers_may(files, listen, knows, allowed, roles):
    """The table of docs/security.md."""
    changes: dict[str, object] = {"callers": files / "callers.toml"} if knows else {}

    found = credentials_of(
        load_settings(listen=listen, allow_anonymous=allowed, allow_plaintext=True, metrics_listen="", **changes)
    )

    assert roles == found.guard.anonymous_roles

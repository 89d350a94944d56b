"""What a client shows of itself: to the server what it needs, to nobody else anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from camserve.client import Credentials

KEY = "camserve_secret"


@pytest.mark.parametrize(
    ("given", "metadata", "uses_tls"),
    [
        ({}, (), False),
        ({"api_key": KEY}, (("x-api-key", KEY),), False),
        ({"token": "a.b.c"}, (("authorization", "Bearer a.b.c"),), False),
        ({"token": lambda: "a.b.c"}, (("authorization", "Bearer a.b.c"),), False),
        ({"tls": True}, (), True),
        ({"ca": "ca.pem", "api_key": KEY}, (("x-api-key", KEY),), True),
        ({"certificate": "me.pem", "key": "me.key"}, (), True),
    ],
)
def test_what_is_given_is_what_is_sent(given, metadata, uses_tls):
    """A key or a token with each call; anything about certificates means TLS."""
    credentials = Credentials(**given)

    assert metadata == credentials.metadata()
    assert uses_tls is credentials.uses_tls


@pytest.mark.parametrize(
    ("name", "kind"), [("ca", "certificate"), ("certificate", "certificate"), ("key", "private key")]
)
def test_a_file_of_another_kind_is_told_before_the_first_call(tmp_path: Path, name: str, kind: str) -> None:
    """Certificate and key mixed up look to gRPC like a server that is away."""
    (tmp_path / "me.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (tmp_path / "me.key").write_text("-----BEGIN PRIVATE KEY-----\n")
    right = {"ca": tmp_path / "me.pem", "certificate": tmp_path / "me.pem", "key": tmp_path / "me.key"}
    wrong = tmp_path / ("me.pem" if name == "key" else "me.key")

    with pytest.raises(ValueError, match=f"{name}: .*{wrong.name} holds no PEM {kind}"):
        Credentials(**{**right, name: wrong}).channel_credentials()
    Credentials(**right).channel_credentials()


def test_a_token_is_asked_for_anew_each_time() -> None:
    """So that one that is renewed is sent as it is now."""
    tokens = iter(["one.b.c", "two.b.c"])
    credentials = Credentials(token=lambda: next(tokens))

    assert ["Bearer one.b.c", "Bearer two.b.c"] == [credentials.metadata()[0][1] for _ in range(2)]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"api_key": KEY, "token": "a.b.c"}, "one credential"),
        ({"certificate": "me.pem"}, "come together"),
        ({"key": "me.key"}, "come together"),
        ({"api_key": f"{KEY}\n"}, "api_key is empty, or has"),
        ({"api_key": ""}, "api_key is empty"),
        ({"token": "à.b.c"}, "token is empty, or has"),
    ],
)
def test_what_cannot_be_sent_is_told_and_not_shown(given: dict[str, Any], why: str) -> None:
    """The complaint of gRPC itself would show the whole text."""
    with pytest.raises(ValueError, match=why) as caught:
        Credentials(**given)

    assert KEY not in str(caught.value)


def test_secrets_are_in_no_repr() -> None:
    """Not even by accident in somebody's log."""
    assert KEY not in repr(Credentials(api_key=KEY))
    assert KEY not in repr(Credentials(token=KEY))

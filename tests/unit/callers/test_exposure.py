"""Who reaches an address, and what a server on it must ask for."""

from __future__ import annotations

import pytest

from camserve.server.callers.exposure import check_exposure, is_local


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:50051", "127.8.8.8:1", "[::1]:50051", "localhost:0", "unix:/run/a.sock", "unix:a.sock"]
)
def test_loopback_and_sockets_are_local(listen):
    """Only this machine reaches them."""
    assert is_local(listen)
    check_exposure(listen, asks_for_credentials=False, has_tls=False, allow_anonymous=False, allow_plaintext=False)


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:0", "10.0.0.7:50051", "gpu7:50051", "localhost.evil:1"])
def test_everything_else_is_not(listen):
    """A name is not looked up; it would have to be trusted."""
    assert not is_local(listen)


@pytest.mark.parametrize(
    ("asks", "tls", "anonymous", "plaintext", "why"),
    [
        (
            False,
            False,
            False,
            False,
            "nothing says who may call.*camserve keys add.*127.0.0.1:50051.*--allow-anonymous",
        ),
        (False, True, False, False, "nothing says who may call"),
        (True, False, False, False, "without TLS.*tls_certificate.*allow_plaintext"),
        (True, False, True, False, "without TLS"),
        (True, True, False, False, ""),
        (True, False, False, True, ""),
        (False, False, True, False, ""),
    ],
)
def test_a_public_address_needs_callers_and_encryption(asks, tls, anonymous, plaintext, why):
    """What is refused tells each way out."""

    def check() -> None:
        check_exposure(
            "0.0.0.0:50051",
            asks_for_credentials=asks,
            has_tls=tls,
            allow_anonymous=anonymous,
            allow_plaintext=plaintext,
        )

    if why:
        with pytest.raises(ValueError, match=why):
            check()
    else:
        assert check() is None

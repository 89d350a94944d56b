"""TLS and mutual TLS on real servers, with certificates that change while calls go on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.credentials import Pair, authority, key_entry, replace, server_pair
from support.servers import Metrics, serving, soon

from camserve.client import AsyncClient, Client, Credentials, PermissionDenied, Unavailable
from camserve.client.cli import main
from camserve.server.background import BackgroundServer

KEY, ENTRY = key_entry("line-3", ["explain"])
OPS, OPS_ENTRY = key_entry("ops", ["explain", "admin"])
ENTRIES = f"{ENTRY}\n{OPS_ENTRY}"


class Materials:
    """An authority, and the files of a server that it signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = authority()
        self.ca = folder / "ca.pem"
        replace(self.ca, self.authority.certificate)
        self.rotate("server one")

    def rotate(self, name: str) -> Pair:
        """Gives the server another certificate and key."""
        pair = server_pair(self.authority, name)
        self.certificate, self.key = pair.write(self.folder, "server")
        return pair

    def client(self, name: str, **alternatives: list[str]) -> dict[str, Path]:
        """What a client of that name shows."""
        certificate, secret = Pair(name, signed_by=self.authority, **alternatives).write(self.folder, name)
        return {"certificate": certificate, "key": secret}

    @property
    def settings(self) -> dict[str, Path]:
        """Of a server with TLS."""
        return {"tls_certificate": self.certificate, "tls_key": self.key}


@pytest.fixture
def materials(tmp_path) -> Materials:
    """Made anew for each test."""
    return Materials(tmp_path)


def shown(server: BackgroundServer) -> bytes:
    """The certificate that a new connection is shown, DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.app.port), timeout=60) as plain,
        context.wrap_socket(plain) as encrypted,
    ):
        return encrypted.getpeercert(binary_form=True) or b""


@contextlib.contextmanager
def watched(server: BackgroundServer, materials: Materials) -> Iterator[grpc.Call]:
    """A call that lasts: Watch of the health service, on a connection of its own."""
    trusted = grpc.ssl_channel_credentials(materials.authority.certificate)
    with grpc.secure_channel(f"localhost:{server.app.port}", trusted) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120)
        assert health_pb2.HealthCheckResponse.SERVING == next(watch).status
        yield watch
        watch.cancel()


def der(pair: Pair) -> bytes:
    """A pair's certificate."""
    return pair.x509.public_bytes(Encoding.DER)


def test_tls_with_a_key(materials):
    """The key travels encrypted; without the authority, or in plain text, there is no connection."""
    path = materials.folder / "callers.toml"
    path.write_text(ENTRIES)
    with serving(listen="0.0.0.0:0", callers=path, **materials.settings) as server:
        target = f"localhost:{server.app.port}"
        with Client(target, credentials=Credentials(api_key=KEY, ca=materials.ca)) as client:
            assert () == client.models()
            with pytest.raises(PermissionDenied, match=r"ROLE_MISSING.*'line-3' has explain"):
                client.load_model("surface")
        for credentials in (Credentials(api_key=KEY), Credentials(api_key=KEY, tls=True)):
            with Client(target, retries=0, timeout=60, credentials=credentials) as client, pytest.raises(Unavailable):
                client.models()


def test_a_command_that_fails_for_tls_says_what_to_look_at(materials):
    """TLS on one side only, another authority, or no certificate where one is asked for: none is a server that is away."""
    other = materials.folder / "other.pem"
    replace(other, authority("another").certificate)

    def told(server, **files):
        words = ["models", "--server", f"localhost:{server.app.port}"]
        done = CliRunner().invoke(
            main, words + [part for name, path in files.items() for part in (f"--{name}", str(path))]
        )
        assert 1 == done.exit_code
        return done.stderr

    with serving() as plain:
        assert "does it speak TLS, is its certificate for this name" in told(plain, ca=materials.ca)
    with serving(**materials.settings) as encrypted:
        assert "does it speak TLS? Then give --ca or --tls" in told(encrypted)
        assert "(unable to get local issuer certificate); " in told(encrypted, ca=other)
    with serving(**materials.settings, tls_client_ca=materials.ca) as mutual:
        assert "does it ask for --certificate and --key?" in told(mutual, ca=materials.ca)


def test_certificates_are_rotated_under_load_and_no_call_fails(materials):
    """New connections see the new certificate, those from before go on; half of a pair, or none, never serves."""
    image = np.zeros((64, 64, 3), np.uint8)
    credentials = Credentials(ca=materials.ca)
    with serving(with_model=True, **materials.settings) as server, watched(server, materials) as watch:
        target = f"localhost:{server.app.port}"
        stop = threading.Event()
        answered = 0

        async def ask(*, anew: bool) -> None:
            nonlocal answered
            while not stop.is_set():
                async with AsyncClient(target, retries=0, timeout=60, credentials=credentials) as client:
                    while not stop.is_set():
                        assert (await client.explain(image, model="surface")).prediction
                        answered += 1
                        if anew:
                            break

        async def load() -> None:
            await asyncio.gather(*(ask(anew=anew) for anew in (False, False, True, True)))

        loading = threading.Thread(target=asyncio.run, args=(load(),))
        failures: list[object] = []
        hook, threading.excepthook = threading.excepthook, failures.append
        try:
            loading.start()
            for turn in range(3):
                before = shown(server)
                replace(materials.certificate, server_pair(materials.authority, "half").certificate)
                soon(lambda: Metrics(server).value("camserve_stale_credentials", setting="tls") == 1)
                assert before == shown(server)
                pair = materials.rotate(f"server {turn}")
                soon(lambda pair=pair: shown(server) == der(pair))
                seen = answered
                soon(lambda seen=seen: answered >= seen + 8 or bool(failures))
        finally:
            stop.set()
            loading.join()
            threading.excepthook = hook

        # The call that was under way all the time hears from its server still.
        server.run(server.app._health.set_server(is_serving=False)).result()
        assert health_pb2.HealthCheckResponse.NOT_SERVING == next(watch).status
    assert [] == failures
    assert 24 <= answered


def test_mutual_tls_lets_in_whom_the_authority_has_certified(materials):
    """As a caller of its certificate's name with the role explain; nobody else gets a connection."""
    stranger = authority("stranger")
    certificate, secret = Pair("me", signed_by=stranger).write(materials.folder, "stranger")
    with serving(**materials.settings, tls_client_ca=materials.ca, log_level="error") as server:
        target = f"localhost:{server.app.port}"
        mine = materials.client("line-3")
        with Client(target, credentials=Credentials(ca=materials.ca, **mine)) as client:
            assert () == client.models()
            with pytest.raises(PermissionDenied, match="'line-3' has explain"):
                client.load_model("surface")
        for shown_to_it in ({}, {"certificate": certificate, "key": secret}):
            credentials = Credentials(ca=materials.ca, **shown_to_it)
            with Client(target, retries=0, timeout=60, credentials=credentials) as client, pytest.raises(Unavailable):
                client.models()


def test_authorities_of_clients_change_while_the_server_serves(materials):
    """Who was certified by the one that left gets no new connection; who has one goes on."""
    other = authority("other")
    clients = materials.folder / "clients.pem"
    replace(clients, materials.authority.certificate)
    mine = Credentials(ca=materials.ca, **materials.client("line-3"))
    certificate, secret = Pair("line-4", signed_by=other).write(materials.folder, "line-4")
    theirs = Credentials(ca=materials.ca, certificate=certificate, key=secret)
    with serving(**materials.settings, tls_client_ca=clients) as server:
        target = f"localhost:{server.app.port}"

        def is_let_in(credentials: Credentials) -> bool:
            with Client(target, retries=0, timeout=60, credentials=credentials) as client:
                try:
                    return client.models() == ()
                except Unavailable:
                    return False

        with Client(target, retries=0, timeout=60, credentials=mine) as before:
            assert () == before.models()
            assert not is_let_in(theirs)
            replace(clients, other.certificate)
            soon(lambda: is_let_in(theirs))
            assert not is_let_in(mine)
            assert () == before.models()


CERTIFICATES = """
[[certificate]]
identity = "spiffe://plant/ops"
name = "operations"
roles = ["explain", "admin"]

[[certificate]]
identity = "line.plant.example"
roles = ["explain"]
"""


@pytest.mark.parametrize(
    ("shows", "name", "may"),
    [
        ({"uris": ["spiffe://plant/ops"], "names": ["x.example"]}, "operations", "explain, admin"),
        ({"names": ["line.plant.example"]}, "line.plant.example", "explain"),
        ({"uris": ["spiffe://plant/other"]}, None, "nobody"),
        ({}, None, "nobody"),
    ],
)
def test_certificates_are_the_callers_that_the_file_names(materials, shows, name, may):
    """By URI or DNS name; a common name does not count beside these, and who is not named is nobody."""
    path = materials.folder / "callers.toml"
    path.write_text(ENTRIES + CERTIFICATES)
    with serving(**materials.settings, tls_client_ca=materials.ca, callers=path) as server:
        target = f"localhost:{server.app.port}"
        pair = materials.client("line.plant.example" if shows else "someone", **shows)
        with Client(target, credentials=Credentials(ca=materials.ca, **pair)) as client:
            if name is None:
                with pytest.raises(PermissionDenied, match="nobody's who is known here"):
                    client.models()
            else:
                assert () == client.models()
                wanted = PermissionDenied if may == "explain" else Exception
                with pytest.raises(wanted, match="ROLE_MISSING" if may == "explain" else "REPOSITORY_MISSING"):
                    client.load_model("surface")
        with Client(target, credentials=Credentials(ca=materials.ca, api_key=OPS, **pair)) as client:
            assert () == client.models()

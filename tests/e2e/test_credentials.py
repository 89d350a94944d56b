"""Keys and tokens on real servers: every wrong one on every rpc, and files that change while calls go on."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import x25519
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from support.credentials import AUDIENCE, ISSUER, ec_key, jwks, key_entry, public_pem, replace, rsa_key, token
from support.rpcs import registered_rpcs
from support.servers import Metrics, serving, settings, soon

from camserve.client import AsyncClient, Client, Credentials, Unauthenticated
from camserve.client.cli import main
from camserve.server.background import BackgroundServer

ISSUER_KEY = ec_key()
KEY, ENTRY = key_entry("line-3", ["explain"])
OPS, OPS_ENTRY = key_entry("ops", ["explain", "admin"])
EXPIRED, EXPIRED_ENTRY = key_entry("old", ["explain", "admin"], expires="2020-01-01T00:00:00Z")
EARLY, EARLY_ENTRY = key_entry("new", ["explain", "admin"], not_before="2100-01-01T00:00:00Z")
ENTRIES = "\n".join((ENTRY, OPS_ENTRY, EXPIRED_ENTRY, EARLY_ENTRY))
MODELS = "/camserve.v1.ModelService/ListModels"
SAMPLE = next((Path(__file__).parents[2] / "server/camserve/server/demo/samples").glob("*.jpg"))


def key(value: str) -> tuple[tuple[str, str], ...]:
    """Metadata with a key."""
    return (("x-api-key", value),)


def bearer(value: str) -> tuple[tuple[str, str], ...]:
    """Metadata with a token, or a key in its place."""
    return (("authorization", f"Bearer {value}"),)


def of_public_key() -> str:
    """A token whose HMAC has the public key for its secret: what alg confusion sends."""
    head, _, _ = token(ISSUER_KEY).partition(".")
    body = token(ISSUER_KEY).split(".")[1]
    head = encoded({"alg": "HS256", "typ": "JWT"})
    signature = hmac.new(public_pem(ISSUER_KEY), f"{head}.{body}".encode(), hashlib.sha256).digest()
    return f"{head}.{body}.{encoded_bytes(signature)}"


def encoded(part: object) -> str:
    """A part of a token."""
    return encoded_bytes(json.dumps(part).encode())


def encoded_bytes(content: bytes) -> str:
    """As tokens have it."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


WRONG: dict[str, tuple[Callable[[], tuple[tuple[str, str], ...]], str]] = {
    "a key of nobody": (lambda: key("camserve_wrong"), "CREDENTIALS_INVALID"),
    "an empty key": (lambda: key(""), "CREDENTIALS_INVALID"),
    "an expired key": (lambda: key(EXPIRED), "CREDENTIALS_EXPIRED"),
    "a key that is not valid yet": (lambda: key(EARLY), "CREDENTIALS_NOT_YET_VALID"),
    "an expired key as bearer": (lambda: bearer(EXPIRED), "CREDENTIALS_EXPIRED"),
    "two keys": (lambda: key(KEY) + key(KEY), "CREDENTIALS_INVALID"),
    "a key and a token": (lambda: key(KEY) + bearer(token(ISSUER_KEY)), "CREDENTIALS_INVALID"),
    "a password": (lambda: (("authorization", "Basic dTpw"),), "CREDENTIALS_INVALID"),
    "a bearer of nothing": (lambda: (("authorization", "Bearer"),), "CREDENTIALS_INVALID"),
    "a token of another key": (lambda: bearer(token(ec_key())), "CREDENTIALS_INVALID"),
    "a token of another kind of key": (lambda: bearer(token(rsa_key(), "RS256")), "CREDENTIALS_INVALID"),
    "an expired token": (lambda: bearer(token(ISSUER_KEY, exp=time.time() - 60)), "CREDENTIALS_EXPIRED"),
    "a token without an end": (lambda: bearer(token(ISSUER_KEY, exp=None)), "CREDENTIALS_INVALID"),
    "a token that is not valid yet": (
        lambda: bearer(token(ISSUER_KEY, nbf=time.time() + 600)),
        "CREDENTIALS_NOT_YET_VALID",
    ),
    "a token for others": (lambda: bearer(token(ISSUER_KEY, aud="billing")), "CREDENTIALS_INVALID"),
    "a token of another issuer": (lambda: bearer(token(ISSUER_KEY, iss="https://evil.example")), "CREDENTIALS_INVALID"),
    "a token without a signature": (
        lambda: bearer(f"{encoded({'alg': 'none'})}.{token(ISSUER_KEY).split('.')[1]}."),
        "CREDENTIALS_INVALID",
    ),
    "a token signed by the public key": (lambda: bearer(of_public_key()), "CREDENTIALS_INVALID"),
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory) -> Iterator[tuple[grpc.Channel, set[str]]]:
    """A server that takes keys and tokens, and what it answers."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "callers.toml").write_text(ENTRIES)
    (folder / "issuer.pem").write_bytes(public_pem(ISSUER_KEY))
    with (
        registered_rpcs() as rpcs,
        serving(
            callers=folder / "callers.toml",
            jwt_keys=folder / "issuer.pem",
            jwt_audience=AUDIENCE,
            jwt_issuer=ISSUER,
        ) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        yield channel, rpcs


def refusal(channel: grpc.Channel, rpc: str, metadata: tuple[tuple[str, str], ...] = ()) -> tuple[grpc.StatusCode, str]:
    """How a call ends before its first answer: code, and the reason in its details; OK if it is answered, or waits for more.

    What was sent is never told.
    """
    call = channel.stream_stream(rpc)(iter([b""]), metadata=metadata, timeout=60)
    try:
        next(call, None)
    except grpc.RpcError as error:
        packed = dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
        details = status_pb2.Status.FromString(packed).details
        infos = [error_details_pb2.ErrorInfo.FromString(item.value) for item in details[:1]]
        code, reason, told = error.code(), "".join(info.reason for info in infos), f"{error.details()}{packed!r}"
    else:
        call.cancel()
        code, reason, told = grpc.StatusCode.OK, "", ""
    secrets = [value.removeprefix("Bearer ") for _, value in metadata if len(value) > len("Bearer ")]
    assert [] == [secret for secret in secrets if secret in told]
    return code, reason


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_credential_is_refused_on_every_rpc(strict, name):
    """Health, reflection and the Open Inference Protocol included, also where none is needed; the credential is never echoed."""
    channel, rpcs = strict
    make, reason = WRONG[name]
    metadata = make()

    answers = {rpc: refusal(channel, rpc, metadata) for rpc in sorted(rpcs)}

    assert 12 < len(answers)
    assert dict.fromkeys(answers, (grpc.StatusCode.UNAUTHENTICATED, reason)) == answers


def test_no_credential_opens_what_probes_ask_and_nothing_else(strict):
    """Everything else says that it is missing."""
    channel, rpcs = strict

    missing = {rpc for rpc in rpcs if refusal(channel, rpc) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING")}

    assert {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    } == rpcs - missing


@pytest.mark.parametrize(
    "metadata",
    [key(KEY), bearer(KEY), bearer(token(ISSUER_KEY)), (("authorization", f"bearer {token(ISSUER_KEY)}"),)],
    ids=["key", "key as bearer", "token", "bearer in small letters"],
)
def test_a_right_credential_opens(strict, metadata):
    """Whichever way it is sent."""
    assert (grpc.StatusCode.OK, "") == refusal(strict[0], MODELS, metadata)


def test_models_are_named_to_nobody_without_a_role(strict):
    """The health of a model would tell that it is there."""
    channel, _ = strict
    ask = channel.unary_unary("/grpc.health.v1.Health/Check")
    named = health_pb2.HealthCheckRequest(service="camserve/surface").SerializeToString()

    codes = []
    for metadata in ((), bearer(token(ISSUER_KEY, roles=["audit"])), key(KEY)):
        with pytest.raises(grpc.RpcError) as caught:
            ask(named, metadata=metadata, timeout=60)
        codes.append(caught.value.code())

    assert [
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
    ] == codes


def test_nothing_is_received_of_a_call_that_is_refused(strict):
    """A message larger than the server takes is refused for its caller, not for its size: it was never read."""
    huge = b"\x00" * (80 << 20)
    with (
        grpc.insecure_channel(strict_target(strict), options=[("grpc.max_send_message_length", -1)]) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary(MODELS)(huge, metadata=key("camserve_wrong"), timeout=60)

    assert grpc.StatusCode.UNAUTHENTICATED is caught.value.code()


def strict_target(strict) -> str:
    """Where the strict server listens."""
    return str(strict[0]._channel.target().decode())


def code(server: BackgroundServer, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    """What ListModels says."""
    with grpc.insecure_channel(server.target) as channel:
        return refusal(channel, MODELS, metadata)[0]


def test_a_key_is_revoked_and_another_added_while_the_server_serves(tmp_path):
    """By replacing the file; a broken one changes nothing but a metric, and the next right one counts."""
    path = tmp_path / "callers.toml"
    replace(path, ENTRIES)
    with serving(callers=path) as server:

        def stale() -> float:
            return Metrics(server).value("camserve_stale_credentials", setting="callers")

        assert grpc.StatusCode.OK is code(server, key(KEY))
        soon(lambda: "camserve_stale_credentials{" in Metrics(server).text())

        replace(path, OPS_ENTRY)
        soon(lambda: code(server, key(KEY)) is grpc.StatusCode.UNAUTHENTICATED)
        assert grpc.StatusCode.OK is code(server, key(OPS))

        replace(path, "[[key]")
        soon(lambda: stale() == 1)
        assert grpc.StatusCode.OK is code(server, key(OPS))
        path.unlink()
        assert grpc.StatusCode.OK is code(server, key(OPS))

        replace(path, ENTRY)
        soon(lambda: code(server, key(KEY)) is grpc.StatusCode.OK)
        assert grpc.StatusCode.UNAUTHENTICATED is code(server, key(OPS))
        assert 0 == stale()
        assert 2 <= Metrics(server).value("camserve_refused_callers_total", reason="CREDENTIALS_INVALID")


def test_files_are_followed_as_kubernetes_changes_them(tmp_path):
    """The file is a link through a folder that is itself a link, and only that one is put in the place of another."""
    for version, entry in (("1", ENTRY), ("2", OPS_ENTRY)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "callers.toml").write_text(entry)
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "callers.toml").symlink_to("..data/callers.toml")
    with serving(callers=tmp_path / "callers.toml") as server:
        assert grpc.StatusCode.OK is code(server, key(KEY))
        (tmp_path / "..data_new").symlink_to("2")
        (tmp_path / "..data_new").replace(tmp_path / "..data")
        soon(lambda: code(server, key(OPS)) is grpc.StatusCode.OK)
        assert grpc.StatusCode.UNAUTHENTICATED is code(server, key(KEY))


def test_a_token_key_that_leaves_the_file_takes_its_tokens_along(tmp_path):
    """And one that comes brings them; both serve while both are there, as an issuer changes its keys."""
    old, new, path = ec_key(), ec_key(), tmp_path / "issuer.json"
    replace(path, jwks(old=old))
    of_old, of_new = (
        bearer(token(old, headers={"kid": "old"})),
        bearer(token(new, headers={"kid": "new"})),
    )
    with serving(jwt_keys=path, jwt_audience=AUDIENCE) as server:
        assert grpc.StatusCode.UNAUTHENTICATED is code(server, of_new)
        replace(path, jwks(old=old, new=new))
        soon(lambda: code(server, of_new) is grpc.StatusCode.OK)
        assert grpc.StatusCode.OK is code(server, of_old)
        replace(path, jwks(new=new))
        soon(lambda: code(server, of_old) is grpc.StatusCode.UNAUTHENTICATED)
        assert grpc.StatusCode.OK is code(server, of_new)


def test_a_file_that_its_reader_fails_on_is_not_the_last_one_read(tmp_path):
    """A key of a kind that nobody here has heard of, or brackets without end: said as of any broken file, and the next counts."""
    key_, path = ec_key(), tmp_path / "issuer.json"
    replace(path, jwks(old=key_))
    of_it = bearer(token(key_, headers={"kid": "old"}))
    unheard_of = x25519.X25519PrivateKey.generate().public_key()
    encoded = unheard_of.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    lines = base64.b64encode(encoded.replace(b"\x2b\x65\x6e", b"\x2b\x65\x05")).decode()
    with serving(jwt_keys=path, jwt_audience=AUDIENCE) as server:

        def stale() -> float:
            return Metrics(server).value("camserve_stale_credentials", setting="jwt_keys")

        soon(lambda: "camserve_stale_credentials{" in Metrics(server).text())
        for broken in (
            f"-----BEGIN PUBLIC KEY-----\n{lines}\n-----END PUBLIC KEY-----\n",
            '{"keys":' + "[" * 100_000,
        ):
            replace(path, broken)
            soon(lambda: stale() == 1)
            assert grpc.StatusCode.OK is code(server, of_it)
            replace(path, jwks(new=ec_key()))
            soon(lambda: code(server, of_it) is grpc.StatusCode.UNAUTHENTICATED)
            replace(path, jwks(old=key_))
            soon(lambda: stale() == 0 and code(server, of_it) is grpc.StatusCode.OK)


def test_a_server_that_knows_nobody_asks_nothing_of_its_own_machine(tmp_path):
    """Whatever credentials a client happens to have; and on a Unix socket likewise."""
    with serving(listen=f"unix:{tmp_path}/socket") as server:
        assert f"unix:{tmp_path}/socket" == server.target
        with Client(server.target, credentials=Credentials(api_key="camserve_any")) as client:
            assert () == client.models()
            with pytest.raises(Exception, match="REPOSITORY_MISSING"):
                client.load_model("surface")


@pytest.mark.parametrize(
    "changes", [{}, {"callers": True, "allow_plaintext": True}], ids=["knows nobody", "knows some"]
)
def test_anonymous_callers_may_explain_if_they_are_allowed_and_nothing_else(tmp_path, changes):
    """On an address that others reach; a wrong key is still wrong where keys are known."""
    path = tmp_path / "callers.toml"
    path.write_text(ENTRIES)
    changes = {**changes, "callers": path} if changes else {}
    with serving(listen="0.0.0.0:0", allow_anonymous=True, **changes) as server:
        with Client(server.target) as client:
            assert () == client.models()
            with pytest.raises(Unauthenticated, match="CREDENTIALS_MISSING"):
                client.load_model("surface")
        if changes:
            assert grpc.StatusCode.UNAUTHENTICATED is code(server, key("camserve_wrong"))


COMMANDS = {
    "models": [],
    "explain": [str(SAMPLE), "--model", "surface", "-m", "grad-cam"],
    "bench": ["--seconds", "0.2", "--warm-up", "0", "--concurrency", "1"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_asks_a_server_sends_the_key(demo_with_callers, name, tmp_path):
    """From the variable or the flag; without it the refusal is told in one line, and the key is in no output or report."""
    words = [name, *COMMANDS[name], "--server", demo_with_callers.target]
    report = ["--json", str(tmp_path / "run.json")] if name == "bench" else []

    without = CliRunner().invoke(main, words)
    by_variable = CliRunner().invoke(main, words, env={"CAMSERVE_API_KEY": KEY})
    by_flag = CliRunner().invoke(main, [*words, *report, "--api-key", KEY])
    doubtful = CliRunner().invoke(main, [*words, "--api-key", KEY, "--token", "a.b.c"])

    assert (1, 0, 0, 2) == tuple(result.exit_code for result in (without, by_variable, by_flag, doubtful))
    assert "CREDENTIALS_MISSING" in without.output
    assert KEY not in by_variable.output + by_flag.output + doubtful.output
    assert all(KEY not in file.read_text() for file in tmp_path.iterdir())


async def test_the_async_client_sends_what_it_is_given(demo_with_callers):
    """With unary calls and with streams; a token that is renewed is asked for with each."""
    given = iter([KEY, OPS, "camserve_wrong"])
    image = np.zeros((64, 64, 3), np.uint8)
    async with AsyncClient(demo_with_callers.target, credentials=Credentials(token=lambda: next(given))) as client:
        assert ["surface"] == [status.name for status in await client.models()]
        assert (await client.explain(image, model="surface")).prediction
        with pytest.raises(Unauthenticated, match="CREDENTIALS_INVALID"):
            await client.models()


@pytest.fixture(scope="module")
def demo_with_callers(tmp_path_factory) -> Iterator[BackgroundServer]:
    """The shipped model, for those who have a key."""
    path = tmp_path_factory.mktemp("demo") / "callers.toml"
    path.write_text(ENTRIES)
    with serving(with_model=True, callers=path) as server:
        yield server


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_a_public_address_does_not_start_by_itself(listen):
    """Before anything is loaded or bound."""
    with pytest.raises(ValueError, match="Three ways out"):
        BackgroundServer(settings(listen=listen), ())


def test_the_log_names_callers_and_holds_no_credentials(tmp_path, capfd):
    """The caller of a call, the reason of a refusal; at the level that says most."""
    path = tmp_path / "callers.toml"
    path.write_text(ENTRIES)
    signed = token(ISSUER_KEY)
    stream = "/inference.GRPCInferenceService/ModelStreamInfer"
    with serving(callers=path, log_level="debug", log_format="json") as server:
        for metadata in (key(KEY), key("camserve_wrong"), bearer(signed), bearer(EXPIRED)):
            code(server, metadata)
        with grpc.insecure_channel(server.target) as channel:
            assert 1 == len(list(channel.stream_stream(stream)(iter([b""]), metadata=key(KEY), timeout=60)))

    logged = capfd.readouterr().err
    found = [json.loads(line) for line in logged.splitlines() if '"call"' in line]
    assert {"line-3"} == {line.get("caller") for line in found if line["rpc"] == stream}
    calls = [line for line in found if line["rpc"] == MODELS]
    assert ["line-3", None, None, None] == [line.get("caller") for line in calls]
    assert [None, "CREDENTIALS_INVALID", "CREDENTIALS_INVALID", "CREDENTIALS_EXPIRED"] == [
        line.get("reason") for line in calls
    ]
    for secret in (KEY, "camserve_wrong", signed, signed.split(".")[2], EXPIRED):
        assert secret not in logged


def test_callers_of_one_host_share_by_their_names(tmp_path):
    """What the planner counts is the name: two keys are two callers, whatever address they come from."""
    path = tmp_path / "callers.toml"
    path.write_text(ENTRIES)
    image = np.zeros((64, 64, 3), np.uint8)
    with serving(with_model=True, callers=path, caller_requests_per_second=1e-6, caller_burst=1) as server:
        for secret in (KEY, OPS):
            with Client(server.target, retries=0, credentials=Credentials(api_key=secret)) as client:
                assert client.explain(image, model="surface").prediction
                with pytest.raises(Exception, match="RATE_LIMITED"):
                    client.explain(image, model="surface")

"""The guard at the gate: whatever is sent as a credential, it answers with a caller or with a refusal, and repeats nothing."""

from __future__ import annotations

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.credentials import AUDIENCE, ec_key, key_entry, public_pem, token

from camserve.server.callers import Guard, Role
from camserve.server.callers.caller_file import read_caller_file
from camserve.server.callers.tokens import TokenRules, caller_of_token, read_token_keys
from camserve.server.errors import CamserveError, PermissionDenied, Reason, Unauthenticated

ISSUER = ec_key()
KEYS = read_token_keys(public_pem(ISSUER))
RULES = TokenRules(audience=AUDIENCE)
KEY, ENTRY = key_entry("line-3", ["explain"])
ENTRIES = read_caller_file(ENTRY.encode()).key
GUARD = Guard(
    keys=lambda: ENTRIES,
    caller_of_token=lambda sent: caller_of_token(sent, KEYS, RULES),
    anonymous_roles=frozenset(),
)
EXPLAIN, LOAD, LIVE = (
    "/camserve.v1.ExplanationService/Explain",
    "/camserve.v1.ModelService/LoadModel",
    "/inference.GRPCInferenceService/ServerLive",
)
HEADERS = st.text(string.printable + "é\u2028", max_size=60)
PARTS = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"", b"{}", b"[" * 9000, b'{"alg": ["ES256"]}', b'{"alg": "ES256", "kid": 3}', b"null"]),
).map(lambda content: base64.urlsafe_b64encode(content).rstrip(b"=").decode())
TOKENS = st.tuples(PARTS, PARTS, PARTS).map(".".join)


@given(
    name=st.sampled_from(["authorization", "x-api-key"]),
    value=st.one_of(HEADERS, TOKENS, TOKENS.map("Bearer {}".format), HEADERS.map("Bearer {}".format)),
)
def test_whatever_is_sent_is_refused_as_a_credential(name, value):
    """Never with a surprise: what strangers send must not become an error of ours."""
    with pytest.raises(Unauthenticated) as caught:
        GUARD.at_the_gate(LIVE, [("user-agent", "x"), (name, value)])

    assert Reason.CREDENTIALS_INVALID == caught.value.reason
    assert len(value) < 20 or value not in caught.value.message


def told(rpc: str, *metadata: tuple[str, str], guard: Guard = GUARD) -> str:
    """The name of the caller, or the reason of the refusal."""
    try:
        caller = guard.at_the_gate(rpc, metadata)
        return guard.inside(rpc, caller, peer="ipv4:10.0.0.7:1", connection=dict).name
    except CamserveError as error:
        return str(error.reason)


@pytest.mark.parametrize(
    ("rpc", "metadata", "expected"),
    [
        (EXPLAIN, (), "CREDENTIALS_MISSING"),
        (LIVE, (), "ipv4:10.0.0.7"),
        (EXPLAIN, (("x-api-key", KEY),), "line-3"),
        (EXPLAIN, (("authorization", f"BEARER  {KEY} "),), "line-3"),
        (EXPLAIN, (("authorization", f"Bearer {token(ISSUER)}"),), "robot"),
        (LOAD, (("x-api-key", KEY),), "ROLE_MISSING"),
        (LIVE, (("x-api-key", "wrong"),), "CREDENTIALS_INVALID"),
        (EXPLAIN, (("x-api-key", token(ISSUER)),), "CREDENTIALS_INVALID"),
        ("/camserve.v1.ModelService/Unheard", (("x-api-key", KEY),), "ROLE_MISSING"),
        ("/camserve.v1.ModelService/Unheard", (), "ROLE_MISSING"),
    ],
)
def test_a_call_is_its_callers_or_refused(rpc, metadata, expected):
    """An rpc that the table does not have is refused to everybody."""
    assert expected == told(rpc, *metadata)


def test_what_is_missing_is_told_as_what_would_be_taken():
    """A server that takes tokens alone does not ask for a key."""
    tokens = Guard(caller_of_token=GUARD.caller_of_token, anonymous_roles=frozenset())

    with pytest.raises(Unauthenticated, match=r"send a token as authorization: Bearer$"):
        tokens.at_the_gate(EXPLAIN, ())
    with pytest.raises(Unauthenticated, match="takes no API keys; send a token"):
        tokens.at_the_gate(EXPLAIN, [("x-api-key", KEY)])


def test_who_knows_nobody_looks_at_no_credentials():
    """There is nothing to compare them with; anonymous callers may what they may."""
    guard = Guard(anonymous_roles=frozenset({Role.EXPLAIN}))

    assert "ipv4:10.0.0.7" == told(EXPLAIN, ("x-api-key", "any"), guard=guard)
    assert "CREDENTIALS_MISSING" == told(LOAD, guard=guard)


SHOWN = {"peer_uri": [b"spiffe://plant/ops"], "x509_common_name": [b"ops"]}


def test_a_key_goes_before_a_certificate():
    """Whoever shows both is who the key says."""
    guard = Guard(
        keys=lambda: ENTRIES,
        certificates=lambda: read_caller_file(b'[[certificate]]\nidentity = "*"\nroles = ["admin"]').certificate,
        anonymous_roles=frozenset(),
    )

    caller = guard.at_the_gate(LOAD, ())
    assert caller is None
    found = guard.inside(LOAD, caller, peer="ipv4:10.0.0.7:1", connection=lambda: SHOWN)
    assert ("spiffe://plant/ops", "certificate") == (found.name, found.how)
    with pytest.raises(PermissionDenied):
        guard.at_the_gate(LOAD, [("x-api-key", KEY)])

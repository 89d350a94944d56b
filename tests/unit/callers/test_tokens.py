"""Tokens: which are accepted, and which are not however they are made up."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import jwt
import pytest
from support.credentials import (
    AUDIENCE,
    ISSUER,
    Pair,
    claims,
    ec_key,
    jwks,
    private_pem,
    public_pem,
    rsa_key,
    token,
)

from camserve.server.callers import Role
from camserve.server.callers.tokens import TokenRules, caller_of_token, read_token_keys
from camserve.server.errors import CamserveError, Reason

RULES = TokenRules(audience=AUDIENCE, issuer=ISSUER)
KEY = ec_key()
RSA = rsa_key()
PEM = public_pem(KEY)
KEYS = read_token_keys(PEM)


def test_a_good_token_is_its_caller():
    """Name from sub, roles from the claim; roles of other services say nothing here."""
    caller = caller_of_token(token(KEY, roles=["explain", "editor"]), KEYS, RULES)

    assert ("robot", {Role.EXPLAIN}, "token") == (caller.name, caller.roles, caller.how)


@pytest.mark.parametrize(
    ("claim", "told", "roles"),
    [
        ("roles", {"roles": "explain admin"}, {Role.EXPLAIN, Role.ADMIN}),
        ("roles", {"roles": None}, set()),
        ("roles", {"roles": {"explain": 1}}, set()),
        ("roles", {"roles": [["explain"], 3, None, "audit"]}, {Role.AUDIT}),
        ("realm_access.roles", {"realm_access": {"roles": ["admin"]}}, {Role.ADMIN}),
        ("realm_access.roles", {"realm_access": "admin"}, set()),
        ("https://a.example/roles", {"https://a.example/roles": ["explain"]}, {Role.EXPLAIN}),
    ],
)
def test_roles_are_read_where_they_are(claim, told, roles):
    """A list or words with spaces; a claim by its name, or by a path."""
    rules = TokenRules(audience=AUDIENCE, roles_claim=claim)

    assert roles == caller_of_token(token(KEY, **{"roles": None, **told}), KEYS, rules).roles


def unsigned(header: dict[str, object], body: dict[str, object], signature: bytes = b"") -> str:
    """A token as an attacker writes it."""

    def part(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    return ".".join([part(json.dumps(header).encode()), part(json.dumps(body).encode()), part(signature)])


def signed_with_the_public_key(algorithm: str, digest: str) -> str:
    """The public key taken for the secret of an HMAC."""
    bare = unsigned({"alg": algorithm, "typ": "JWT"}, claims(roles=["admin"])).rpartition(".")[0]
    signature = hmac.new(PEM, bare.encode(), getattr(hashlib, digest)).digest()
    return f"{bare}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


BAD = {
    "of another key": (lambda: token(ec_key()), Reason.CREDENTIALS_INVALID, "signature"),
    "of no algorithm": (lambda: unsigned({"alg": "none"}, claims()), Reason.CREDENTIALS_INVALID, "algorithm"),
    "of an odd none": (lambda: unsigned({"alg": "nOnE"}, claims()), Reason.CREDENTIALS_INVALID, "algorithm"),
    "without a header": (lambda: unsigned({}, claims()), Reason.CREDENTIALS_INVALID, "token"),
    "HS256 by the public key": (
        lambda: signed_with_the_public_key("HS256", "sha256"),
        Reason.CREDENTIALS_INVALID,
        "algorithm",
    ),
    "HS512 by the public key": (
        lambda: signed_with_the_public_key("HS512", "sha512"),
        Reason.CREDENTIALS_INVALID,
        "algorithm",
    ),
    "of another kind of key": (lambda: token(RSA, "RS256"), Reason.CREDENTIALS_INVALID, "algorithm"),
    "with a key of its own": (
        lambda: token(
            (own := ec_key()), headers={"jwk": jwt.algorithms.ECAlgorithm.to_jwk(own.public_key(), as_dict=True)}
        ),
        Reason.CREDENTIALS_INVALID,
        "signature",
    ),
    "with critical headers": (
        lambda: token(KEY, headers={"crit": ["exp"]}),
        Reason.CREDENTIALS_INVALID,
        "not accepted",
    ),
    "expired": (lambda: token(KEY, exp=time.time() - 60), Reason.CREDENTIALS_EXPIRED, "expired"),
    "without an end": (lambda: token(KEY, exp=None), Reason.CREDENTIALS_INVALID, "'exp'"),
    "with an odd end": (lambda: unsigned_body(exp="soon"), Reason.CREDENTIALS_INVALID, "malformed"),
    "not valid yet": (lambda: token(KEY, nbf=time.time() + 60), Reason.CREDENTIALS_NOT_YET_VALID, "not valid yet"),
    "for others": (lambda: token(KEY, aud="billing"), Reason.CREDENTIALS_INVALID, AUDIENCE),
    "for nobody": (lambda: token(KEY, aud=None), Reason.CREDENTIALS_INVALID, "'aud'"),
    "of another issuer": (lambda: token(KEY, iss="https://evil.example"), Reason.CREDENTIALS_INVALID, ISSUER),
    "of no issuer": (lambda: token(KEY, iss=None), Reason.CREDENTIALS_INVALID, "'iss'"),
    "of nobody": (lambda: token(KEY, sub=None), Reason.CREDENTIALS_INVALID, "'sub'"),
    "of an empty name": (lambda: token(KEY, sub=""), Reason.CREDENTIALS_INVALID, "characters"),
    "called like a host": (lambda: token(KEY, sub="ipv4:10.0.0.7"), Reason.CREDENTIALS_INVALID, "address"),
    "an endless end": (lambda: unsigned_body(exp=float("inf")), Reason.CREDENTIALS_INVALID, "malformed"),
    "a name that is no text": (lambda: unsigned_body(sub=["robot"]), Reason.CREDENTIALS_INVALID, "malformed"),
    "a deep header": (lambda: f"{encoded('[' * 9000)}.e30.x", Reason.CREDENTIALS_INVALID, "no JSON Web Token"),
    "a header that is no table": (lambda: f"{encoded('3')}.e30.x", Reason.CREDENTIALS_INVALID, "no JSON Web Token"),
    "deep claims": (
        lambda: f"{encoded(json.dumps({'alg': 'ES256'}))}.{encoded('[' * 9000)}.x",
        Reason.CREDENTIALS_INVALID,
        "",
    ),
    "no token": (lambda: "a.b.c", Reason.CREDENTIALS_INVALID, "no JSON Web Token"),
    "not even letters": (lambda: "é.\u2028.☃", Reason.CREDENTIALS_INVALID, "no JSON Web Token"),
}


def encoded(part: str) -> str:
    """A part of a token."""
    return base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode()


def unsigned_body(**changes: object) -> str:
    """A token that is signed, with claims that the library for making them would refuse."""
    return jwt.api_jws.encode(json.dumps(claims(**changes)).encode(), KEY, algorithm="ES256")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_token_is_refused(name):
    """UNAUTHENTICATED with the reason, in words that tell what to do and never hold the token."""
    make, reason, word = BAD[name]
    sent = make()

    with pytest.raises(CamserveError) as caught:
        caller_of_token(sent, KEYS, RULES)

    assert reason == caught.value.reason
    assert word in caught.value.message
    assert sent not in caught.value.message


def test_clocks_may_differ_by_seconds():
    """Just over is not over."""
    assert "robot" == caller_of_token(token(KEY, exp=time.time() - 2), KEYS, RULES).name


def test_keys_come_as_pem_certificates_or_jwks():
    """Several in one file; a token says by its key id which one, or all that fit are tried."""
    one, two = ec_key(), ec_key()
    pems = read_token_keys(public_pem(RSA) + public_pem(one) + Pair("issuer").certificate)
    named = read_token_keys(jwks(one=one, two=two).encode())

    assert 3 == len(pems)
    assert "robot" == caller_of_token(token(one), pems, RULES).name
    assert "robot" == caller_of_token(token(RSA, "PS384", headers={"kid": "anything"}), pems, RULES).name
    assert "robot" == caller_of_token(token(two, headers={"kid": "two"}), named, RULES).name
    assert "robot" == caller_of_token(token(two), named, RULES).name
    for key_id in ("one", "three"):
        with pytest.raises(CamserveError, match="not accepted"):
            caller_of_token(token(two, headers={"kid": key_id}), named, RULES)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no public key"),
        (b"{}", "'keys'"),
        (b"{", "no JWKS"),
        (b'{"keys": []}', "no public key"),
        (b'{"keys": [3]}', "no list of keys"),
        (b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', r"keys\[0\] is symmetric"),
        (b'{"keys": [{"kty": "EC"}]}', r"keys\[0\] \(kty 'EC'\) cannot be read"),
        (public_pem(rsa_key(1024)), "1024 bits"),
        (private_pem(KEY), "'PRIVATE KEY' is no public key"),
    ],
)
def test_a_file_without_good_keys_is_refused(content, why):
    """At the start, or when it is read again; nothing of a private key is told."""
    with pytest.raises(ValueError, match=why) as caught:
        read_token_keys(content)

    assert private_pem(KEY).decode().splitlines()[1] not in str(caught.value)


def test_a_key_that_says_its_algorithm_is_used_for_no_other():
    """As its JWKS says."""
    entry = jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True)
    keys = read_token_keys(json.dumps({"keys": [{**entry, "alg": "RS256"}]}).encode())

    assert "robot" == caller_of_token(token(RSA, "RS256"), keys, RULES).name
    with pytest.raises(CamserveError, match="algorithm"):
        caller_of_token(token(RSA, "PS256"), keys, RULES)


@pytest.mark.parametrize("change", [{"alg": "RS1"}, {"kty": None}, {"kty": "RSA2"}, {"n": 5}])
def test_a_private_key_of_a_jwks_that_cannot_be_read_is_not_told(change):
    """Who puts one there by mistake must not find it in a log as well."""
    entry = {**jwt.algorithms.RSAAlgorithm.to_jwk(RSA, as_dict=True), **change}

    with pytest.raises(ValueError, match=r"keys\[0\] .*cannot be read") as caught:
        read_token_keys(json.dumps({"keys": [{name: value for name, value in entry.items() if value}]}).encode())

    assert entry["d"] not in str(caught.value)

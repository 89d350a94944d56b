"""JWT bearer tokens: verified by public keys from a file, and read as callers. `guard.py` asks; `credentials.py` reads the file.

An algorithm is taken only if the key that verifies it is made for it: no `none`, and no HMAC, for which a public key would be the
secret. Imported only where a server has `jwt_keys`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from camserve.server.callers.caller import Caller, Role, name_complaint
from camserve.server.errors import CamserveError, Reason, Unauthenticated

__all__ = ["TokenKey", "TokenRules", "caller_of_token", "read_token_keys"]

_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Mapping[str, str] = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_LEAST_RSA_BITS = 2048
# Clocks differ by seconds.
_LEEWAY_SECONDS = 10.0
# What the library may raise for bytes of strangers: not all of it is its own in every version.
_MALFORMED = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenKey:
    """A key that verifies tokens.

    Attributes:
        key: the public key.
        algorithms: those it is made for.
        key_id: `kid` of the tokens that it verifies; empty for any.
    """

    key: Any
    algorithms: frozenset[str]
    key_id: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What a token must say.

    Attributes:
        audience: for whom it was made.
        issuer: who made it; empty for any whose key is known.
        roles_claim: where its roles stand: a claim, or a path with points, such as `realm_access.roles`.
    """

    audience: str
    issuer: str = ""
    roles_claim: str = "roles"


def read_token_keys(content: bytes) -> tuple[TokenKey, ...]:
    """Reads a JWKS, or public keys and certificates as PEM, one after another.

    Raises:
        ValueError: there is no key in it, or one that cannot be used.
    """
    keys = _of_jwks(content) if content.lstrip().startswith(b"{") else _of_pem(content)
    if not keys:
        raise ValueError("there is no public key in it; give a JWKS, or public keys as PEM")
    return keys


def caller_of_token(token: str, keys: Iterable[TokenKey], rules: TokenRules) -> Caller:
    """Who a token was made for.

    Raises:
        Unauthenticated: it is malformed, of a key that is not known, for others, expired, or not valid yet. No text holds it.
    """
    try:
        header = jwt.get_unverified_header(token)
    except _MALFORMED as error:
        raise _invalid("it is no JSON Web Token") from error
    if "crit" in header:
        raise _invalid("it has critical headers, of which none is understood here")
    algorithm, key_id = str(header.get("alg")), str(header.get("kid", ""))
    named = [key for key in keys if key_id and key.key_id == key_id]
    fitting = [
        key for key in named or keys if algorithm in key.algorithms and (key in named or not key.key_id or not key_id)
    ]
    if not fitting:
        raise _invalid("no key of this server verifies tokens of its key id and algorithm")
    refusal: CamserveError = _invalid("its signature is of no key of this server")
    for key in fitting:
        try:
            claims = _claims(token, key, algorithm, rules)
        except jwt.InvalidSignatureError:
            continue
        except _MALFORMED as error:
            refusal = _refusal(error, rules)
            break
        return _caller(claims, rules)
    raise refusal


def _claims(token: str, key: TokenKey, algorithm: str, rules: TokenRules) -> Mapping[str, Any]:
    required = ["exp", "sub", "aud", *(["iss"] if rules.issuer else [])]
    claims: Mapping[str, Any] = jwt.decode(
        token,
        key.key,
        algorithms=[algorithm],
        audience=rules.audience,
        issuer=rules.issuer or None,
        leeway=_LEEWAY_SECONDS,
        options={"require": required},
    )
    return claims


def _caller(claims: Mapping[str, Any], rules: TokenRules) -> Caller:
    name = claims["sub"]
    if complaint := name_complaint(name):
        raise _invalid(f"its 'sub' cannot be used: {complaint}")
    words = _at(claims, rules.roles_claim)
    words = words.split() if isinstance(words, str) else words if isinstance(words, list) else []
    # Other services' roles stand there too.
    return Caller(name=name, roles=frozenset(role for role in Role if role in words), how="token")


def _at(claims: Mapping[str, Any], claim: str) -> Any:
    """A claim by its name, which may have points in it, or by a path."""
    if claim in claims:
        return claims[claim]
    value: Any = claims
    for part in claim.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _refusal(error: Exception, rules: TokenRules) -> CamserveError:
    match error:
        case jwt.ExpiredSignatureError():
            return Unauthenticated(Reason.CREDENTIALS_EXPIRED, "this token has expired; get a new one from its issuer")
        case jwt.ImmatureSignatureError():
            return Unauthenticated(
                Reason.CREDENTIALS_NOT_YET_VALID, "this token is not valid yet; try again later, and compare the clocks"
            )
        case jwt.InvalidAudienceError():
            return _invalid(f"it was made for others; its 'aud' has to name {rules.audience!r}")
        case jwt.InvalidIssuerError():
            return _invalid(f"its 'iss' has to be {rules.issuer!r}")
        case jwt.MissingRequiredClaimError():
            return _invalid(f"it has no {error.claim!r}")
        case _:
            return _invalid("its claims are malformed")


def _invalid(why: str) -> Unauthenticated:
    return Unauthenticated(
        Reason.CREDENTIALS_INVALID, f"this token is not accepted: {why}; get another one from its issuer"
    )


def _of_jwks(content: bytes) -> tuple[TokenKey, ...]:
    try:
        entries = json.loads(content)["keys"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("no JWKS: there is no list 'keys' in it") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("no JWKS: 'keys' is no list of keys")
    return tuple(_of_jwk(entry, index) for index, entry in enumerate(entries) if entry.get("use", "sig") == "sig")


def _of_jwk(entry: dict[str, Any], index: int) -> TokenKey:
    if entry.get("kty") == "oct":
        raise ValueError(f"keys[{index}] is symmetric: whoever verifies with it could make tokens too; use a key pair")
    try:
        read = jwt.PyJWK.from_dict(entry)
    except (jwt.PyJWTError, ValueError) as error:
        # The library's own text is not handed on: it may hold the whole key, and by mistake that is a private one.
        kind = ", ".join(
            f"{name} {entry[name]!r}" for name in ("kty", "crv", "alg") if isinstance(entry.get(name), str)
        )
        raise ValueError(
            f"keys[{index}] ({kind or 'without kty'}) cannot be read: something is missing or wrong in it, or nothing here is "
            "of its kind"
        ) from error
    public = _public(read.key)
    algorithms = _algorithms(public, f"keys[{index}]")
    if "alg" in entry:
        algorithms &= {entry["alg"]}
        if not algorithms:
            raise ValueError(f"keys[{index}] is not made for its own 'alg'")
    return TokenKey(key=public, algorithms=algorithms, key_id=str(entry.get("kid", "")))


def _of_pem(content: bytes) -> tuple[TokenKey, ...]:
    found = []
    for block in _blocks(content):
        try:
            if block.startswith(_CERTIFICATE):
                public: Any = x509.load_pem_x509_certificate(block).public_key()
            else:
                public = serialization.load_pem_public_key(block)
        except ValueError as error:
            kind = block.partition(b"\n")[0].decode(errors="replace").strip("- ").removeprefix("BEGIN ")
            raise ValueError(f"a block {kind!r} is no public key and no certificate") from error
        found.append(TokenKey(key=public, algorithms=_algorithms(public, "a key")))
    return tuple(found)


def _blocks(content: bytes) -> list[bytes]:
    return [b"-----BEGIN " + part for part in content.split(b"-----BEGIN ")[1:]]


def _public(key: Any) -> Any:
    """Of a pair by mistake, only the half that is needed is kept."""
    return key.public_key() if hasattr(key, "public_key") else key


def _algorithms(key: Any, place: str) -> frozenset[str]:
    match key:
        case rsa.RSAPublicKey():
            if key.key_size < _LEAST_RSA_BITS:
                raise ValueError(f"{place} has {key.key_size} bits; RSA keys need {_LEAST_RSA_BITS}")
            return _RSA
        case ec.EllipticCurvePublicKey() if key.curve.name in _CURVES:
            return frozenset({_CURVES[key.curve.name]})
        case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            return frozenset({"EdDSA"})
        case _:
            raise ValueError(f"{place} is of no kind that is used here: RSA, P-256, P-384, P-521, Ed25519 or Ed448")

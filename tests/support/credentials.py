"""Credentials for tests: authorities, certificates, key pairs, tokens and files of callers, all made anew and real."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from camserve.server.callers.api_keys import digest_of, new_key

AUDIENCE = "camserve-test"
ISSUER = "https://issuer.example"


class Pair:
    """A certificate and its private key; an authority signs others."""

    def __init__(
        self,
        name: str,
        *,
        signed_by: Pair | None = None,
        uris: Sequence[str] = (),
        names: Sequence[str] = (),
        is_authority: bool = False,
    ) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(signed_by.x509.subject if signed_by else subject)
            .public_key(self.private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        for other in names:
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(other)))
            except ValueError:
                alternatives.append(x509.DNSName(other))
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        self.x509 = builder.sign(signed_by.private if signed_by else self.private, hashes.SHA256())

    @property
    def certificate(self) -> bytes:
        """PEM."""
        return self.x509.public_bytes(serialization.Encoding.PEM)

    @property
    def key(self) -> bytes:
        """PEM, private."""
        return private_pem(self.private)

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Lays certificate and key into a folder, the way they are replaced in use: each as a whole."""
        paths = folder / f"{name}.pem", folder / f"{name}.key"
        for path, content in zip(paths, (self.certificate, self.key), strict=True):
            replace(path, content)
        return paths


def replace(path: Path, content: bytes | str) -> None:
    """Puts a whole new file into its place."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    new.replace(path)


def authority(name: str = "authority") -> Pair:
    """One that signs certificates."""
    return Pair(name, is_authority=True)


def server_pair(signed_by: Pair, name: str = "server") -> Pair:
    """A certificate for servers on this machine."""
    return Pair(name, signed_by=signed_by, names=["localhost", "127.0.0.1"])


def private_pem(key: Any) -> bytes:
    """PEM of a private key."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: Any) -> bytes:
    """PEM of a private key's public half."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def rsa_key(bits: int = 2048) -> Any:
    """A private key."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def ec_key() -> Any:
    """A private key, quick to make."""
    return ec.generate_private_key(ec.SECP256R1())


def jwks(**keys: Any) -> str:
    """A JWKS of the public halves of P-256 keys, by their key ids."""
    entries = []
    for key_id, key in keys.items():
        entry = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
        entries.append({**entry, "kid": key_id, "alg": "ES256", "use": "sig"})
    return json.dumps({"keys": entries})


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token says; None leaves a claim out."""
    told = {
        "sub": "robot",
        "aud": AUDIENCE,
        "iss": ISSUER,
        "exp": time.time() + 3600,
        "roles": ["explain"],
        **changes,
    }
    return {name: value for name, value in told.items() if value is not None}


def token(key: Any, algorithm: str = "ES256", *, headers: dict[str, Any] | None = None, **changes: Any) -> str:
    """A signed token."""
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers=headers)


def key_entry(name: str, roles: Sequence[str], **times: str) -> tuple[str, str]:
    """A new key, and its entry for a file of callers."""
    key = new_key()
    lines = [
        "[[key]]",
        f'name = "{name}"',
        f'sha256 = "{digest_of(key)}"',
        f"roles = {json.dumps(list(roles))}",
        *(f"{name} = {value}" for name, value in times.items()),
    ]
    return key, "\n".join(lines) + "\n"

"""The server's certificate, its private key, and the authorities of clients, read and checked together.

So half of a pair never serves. `credentials.py` reads them at the start and whenever they change; `listening.py` hands them on.
"""

from __future__ import annotations

import dataclasses

from cryptography import x509
from cryptography.hazmat.primitives import serialization

__all__ = ["TlsFiles", "read_tls_files"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What a TLS port needs.

    Attributes:
        certificate: PEM, the server's first, then those between it and an authority.
        key: PEM, its private key; never shown.
        client_ca: PEM, the authorities whose clients are let in; None lets in clients without a certificate.
    """

    certificate: bytes
    key: bytes = dataclasses.field(repr=False)
    client_ca: bytes | None = None


def read_tls_files(certificate: bytes, key: bytes, client_ca: bytes | None = None) -> TlsFiles:
    """Checks what was read.

    Raises:
        ValueError: one of them is not what it should be, or the key is another certificate's. The text holds none of them.
    """
    try:
        chain = x509.load_pem_x509_certificates(certificate)
    except ValueError as error:
        raise ValueError("tls_certificate is no PEM certificate") from error
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        # The library's own text is not handed on: it may hold a piece of the key.
        raise ValueError("tls_key is no PEM private key without a password") from error
    if client_ca is not None:
        try:
            x509.load_pem_x509_certificates(client_ca)
        except ValueError as error:
            raise ValueError("tls_client_ca is no PEM certificate") from error
    if _spki(chain[0].public_key()) != _spki(private.public_key()):
        raise ValueError("tls_key belongs to another certificate than the first one of tls_certificate")
    return TlsFiles(certificate=certificate, key=key, client_ca=client_ca)


def _spki(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined,no-any-return]  # every public key has it
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )

"""Whether a server is open to more than was meant: who reaches its port, and what it asks of them. Pure; called at the start."""

from __future__ import annotations

import ipaddress

__all__ = ["check_exposure", "is_local"]


def is_local(listen: str) -> bool:
    """Whether only this machine reaches an address: loopback, or a Unix socket."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(
    listen: str, *, asks_for_credentials: bool, has_tls: bool, allow_anonymous: bool, allow_plaintext: bool
) -> None:
    """Refuses what would surprise its owner.

    Raises:
        ValueError: others than this machine reach the port, and everybody may call, or keys and tokens could be read on the way.
    """
    if is_local(listen):
        return
    if not asks_for_credentials and not allow_anonymous:
        raise ValueError(
            f"listen={listen} can be reached from other machines, and nothing says who may call. Three ways out: say who may, by "
            "API keys (`camserve keys add NAME --role explain --file callers.toml`, then --callers callers.toml), by tokens "
            "(jwt_keys) or by client certificates (tls_client_ca); or listen on this machine only (--listen 127.0.0.1:50051); "
            "or let in everybody who reaches the port (--allow-anonymous, CAMSERVE_ALLOW_ANONYMOUS=true)"
        )
    if asks_for_credentials and not has_tls and not allow_plaintext:
        raise ValueError(
            f"listen={listen} can be reached from other machines without TLS: keys and tokens could be read on the way. Give a "
            "certificate (tls_certificate, tls_key), or say that something in front encrypts (allow_plaintext=true, "
            "CAMSERVE_ALLOW_PLAINTEXT=true)"
        )

"""From settings to a guard, and to the files behind it that can change. Called by `app.py`, which follows the files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camserve.server.callers.caller import Caller, Role
from camserve.server.callers.caller_file import read_caller_file
from camserve.server.callers.certificates import ANY_CERTIFICATE
from camserve.server.callers.exposure import check_exposure, is_local
from camserve.server.callers.guard import Guard
from camserve.server.callers.limits import CallerLimits
from camserve.server.callers.own_limits import OwnLimits
from camserve.server.callers.reloaded import Reloaded
from camserve.server.settings import Settings

if TYPE_CHECKING:
    from camserve.server.callers.tls_files import TlsFiles

__all__ = ["Credentials", "credentials_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """How a server knows its callers, and how they know it.

    Attributes:
        guard: asks each call.
        files: what is behind it, to be followed.
        tls: the certificate of the port; None for plain text.
        limits_of: what a caller may take, by its name.
    """

    guard: Guard
    files: tuple[Reloaded[Any], ...]
    tls: Reloaded[TlsFiles] | None
    limits_of: Callable[[str], CallerLimits]


def credentials_of(settings: Settings) -> Credentials:
    """Reads the files that the settings name.

    Raises:
        ValueError: one cannot be read or is wrong, or the server would be open to more than was meant.
    """
    callers = None
    if settings.callers is not None:
        callers = Reloaded("callers", [settings.callers], read_caller_file)
    tokens, caller_of_token = _tokens(settings)
    tls = _tls(settings)
    has_client_ca = settings.tls_client_ca is not None
    guard = Guard(
        keys=None if callers is None else lambda: callers.value.key,
        caller_of_token=caller_of_token,
        certificates=(
            None if not has_client_ca else lambda: ANY_CERTIFICATE if callers is None else callers.value.certificate
        ),
        anonymous_roles=_anonymous_roles(settings, asks=any((callers, tokens, has_client_ca))),
    )
    check_exposure(
        settings.listen,
        asks_for_credentials=guard.asks_for_credentials,
        has_tls=tls is not None,
        allow_anonymous=settings.allow_anonymous,
        allow_plaintext=settings.allow_plaintext,
    )
    files = (callers, tokens, tls)
    default = settings.caller_limits
    return Credentials(
        guard=guard,
        files=tuple(file for file in files if file is not None),
        tls=tls,
        limits_of=(lambda _caller: default) if callers is None else OwnLimits(default, lambda: callers.value),
    )


def _anonymous_roles(settings: Settings, *, asks: bool) -> frozenset[Role]:
    """Everything on a machine of one's own that asks for nothing; elsewhere explanations, if they are allowed at all."""
    if is_local(settings.listen) and not asks:
        return frozenset(Role)
    return frozenset({Role.EXPLAIN}) if settings.allow_anonymous else frozenset()


def _tokens(settings: Settings) -> tuple[Reloaded[Any] | None, Callable[[str], Caller] | None]:
    if settings.jwt_keys is None or not settings.jwt_audience:
        return None, None
    # Imported here, as below: most servers take no tokens, and start without what that needs.
    from camserve.server.callers.tokens import TokenRules, caller_of_token, read_token_keys  # noqa: PLC0415

    keys = Reloaded("jwt_keys", [settings.jwt_keys], read_token_keys)
    rules = TokenRules(
        audience=settings.jwt_audience, issuer=settings.jwt_issuer or "", roles_claim=settings.jwt_roles_claim
    )
    return keys, lambda token: caller_of_token(token, keys.value, rules)


def _tls(settings: Settings) -> Reloaded[TlsFiles] | None:
    paths: list[Path] = [
        path for path in (settings.tls_certificate, settings.tls_key, settings.tls_client_ca) if path is not None
    ]
    if not paths:
        return None
    from camserve.server.callers.tls_files import read_tls_files  # noqa: PLC0415

    return Reloaded("tls", paths, read_tls_files)

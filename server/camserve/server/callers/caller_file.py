"""The file that names callers: API keys by their hashes, and client certificates. TOML in, frozen entries out.

Read by `credentials.py` at the start and again whenever it changes; written by `camserve keys`.
"""

from __future__ import annotations

import tomllib
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from camserve.server.callers.caller import Role, name_complaint

__all__ = ["CallerFile", "CertificateEntry", "KeyEntry", "read_caller_file"]


def _name(value: str) -> str:
    if complaint := name_complaint(value):
        raise ValueError(complaint)
    return value


_Name = Annotated[str, AfterValidator(_name)]
_Roles = Annotated[frozenset[Role], Field(min_length=1)]


class _Entry(BaseModel):
    # Who writes a key where its hash belongs must not find it in a log.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class KeyEntry(_Entry):
    """One API key.

    Attributes:
        name: of the caller; several keys may have one name, so that a new one can be handed out before the old one goes.
        sha256: of the key, in hexadecimal. Keys are 256 random bits, so that nobody can try them out: a slow hash, which
            passwords need, would only slow down each call.
        roles: what the caller may do.
        not_before: from when on it is valid; None from ever.
        expires: until when; None for ever.
    """

    name: _Name
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    roles: _Roles
    not_before: AwareDatetime | None = None
    expires: AwareDatetime | None = None


class CertificateEntry(_Entry):
    """A client certificate that is a caller.

    Attributes:
        identity: its URI or DNS name among the alternative names, its common name where it has none of these, or `*` for any
            certificate of the authority.
        name: of the caller; None takes the certificate's identity.
        roles: what the caller may do.
    """

    identity: Annotated[str, StringConstraints(min_length=1)]
    name: _Name | None = None
    roles: _Roles


class CallerFile(_Entry):
    """All callers that are named.

    Attributes:
        key: of those who send a key.
        certificate: of those who show a certificate; the first that matches counts.
    """

    key: tuple[KeyEntry, ...] = ()
    certificate: tuple[CertificateEntry, ...] = ()


def read_caller_file(content: bytes) -> CallerFile:
    """Reads a file's content.

    Raises:
        ValueError: it is no TOML, or an entry is wrong; the text never holds what stands in the file.
    """
    try:
        return CallerFile.model_validate(tomllib.loads(content.decode()))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError("not TOML: not UTF-8") from error
    except ValidationError as error:
        places = [
            f"{_place(item['loc'])}: {item['msg']}" for item in error.errors(include_input=False, include_url=False)
        ]
        raise ValueError("; ".join(places)) from error


def _place(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")

"""The file that names callers: API keys by their hashes, and client certificates. TOML in, frozen entries out.

Read by `credentials.py` at the start and again whenever it changes; written by `camserve keys`.
"""

from __future__ import annotations

import tomllib
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

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


class _LimitedEntry(_Entry):
    # What the caller may take; None leaves it to the settings `caller_…`, 0 is no limit.
    requests_per_second: Annotated[float, Field(ge=0, le=1e6)] | None = None
    burst: Annotated[int, Field(ge=0)] | None = None
    concurrency: Annotated[int, Field(ge=0)] | None = None


class KeyEntry(_LimitedEntry):
    """One API key.

    Attributes:
        name: of the caller; several keys may have one name, so that a new one can be handed out before the old one goes.
        sha256: of the key, in hexadecimal. Keys are 256 random bits, so that nobody can try them out: a slow hash, which
            passwords need, would only slow down each call.
        roles: what the caller may do.
        not_before: from when on it is valid; None from ever.
        expires: until when; None for ever.
        requests_per_second: as the setting `caller_requests_per_second`, for this caller; None for what that says.
        burst: likewise.
        concurrency: likewise.
    """

    name: _Name
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    roles: _Roles
    not_before: AwareDatetime | None = None
    expires: AwareDatetime | None = None

    @property
    def caller_name(self) -> str:
        """Whose limits these are."""
        return self.name


class CertificateEntry(_LimitedEntry):
    """A client certificate that is a caller.

    Attributes:
        identity: its URI or DNS name among the alternative names, its common name where it has none of these, or `*` for any
            certificate of the authority.
        name: of the caller; None takes the certificate's identity.
        roles: what the caller may do.
        requests_per_second: as of a key, likewise the next two.
        burst: see there.
        concurrency: see there.
    """

    identity: Annotated[str, StringConstraints(min_length=1)]
    name: _Name | None = None
    roles: _Roles

    @model_validator(mode="after")
    def _limits_are_somebodys(self) -> Self:
        # Every certificate is then a caller of its own, by a name that is not known here.
        has_limits = not (self.requests_per_second is None and self.burst is None and self.concurrency is None)
        if has_limits and self.identity == "*" and self.name is None:
            raise ValueError(
                "limits of identity '*' would be nobody's: give it a name, which all of them share, or set caller_concurrency, "
                "caller_requests_per_second and caller_burst for everybody"
            )
        return self

    @property
    def caller_name(self) -> str:
        """Whose limits these are."""
        return self.name or self.identity


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

"""Every setting of a server: its default, its unit, and why someone would change it.

The only reader of the environment (`CAMSERVE_…`) and of the configuration file; `cli.py` passes flags in. Frozen and validated,
then handed to `app.py` as plain values.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from camserve.server.callers.limits import CallerLimits
from camserve.server.jobs import Lane
from camserve.server.scheduling import Limits

__all__ = [
    "Settings",
    "Source",
    "SourceKind",
    "SourcedSettings",
    "complaint",
    "load_settings",
    "load_sourced_settings",
]

_LARGEST_PORT = 65535
# Below, callers would take turns where nobody means harm.
_FEWEST_MESSAGES = 8


class Settings(BaseSettings):
    """A server's settings."""

    model_config = SettingsConfigDict(env_prefix="CAMSERVE_", frozen=True, extra="forbid", protected_namespaces=())

    listen: str = Field(
        "127.0.0.1:50051",
        description="Address and port for gRPC, or unix:PATH; port 0 picks a free one. Other machines need credentials.",
    )
    metrics_listen: str = Field(
        "0.0.0.0:8002", description="Address and port for /metrics, /livez and /readyz; empty for none."
    )
    callers: Path | None = Field(
        None,
        description="File of API keys and client certificates: who may call, and do what; `camserve keys` fills it.",
    )
    jwt_keys: Path | None = Field(
        None, description="Public keys that verify bearer tokens (JWT): a JWKS, or PEM. Callers may then send tokens."
    )
    jwt_audience: str | None = Field(None, description="What the aud of a token has to name; required with jwt_keys.")
    jwt_issuer: str | None = Field(
        None, description="What the iss of a token has to be; without it any whose key is known."
    )
    jwt_roles_claim: str = Field(
        "roles", min_length=1, description="Where a token has its roles: a claim, or a path such as realm_access.roles."
    )
    tls_certificate: Path | None = Field(
        None,
        description="The server's certificate, PEM, with those between it and its authority. The port then speaks TLS.",
    )
    tls_key: Path | None = Field(None, description="File of its private key, PEM without a password.")
    tls_client_ca: Path | None = Field(
        None, description="Authorities of clients, PEM: each connection then has to show a certificate (mutual TLS)."
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Whether callers without credentials get explanations too, from whichever machine they call.",
    )
    allow_plaintext: bool = Field(
        default=False,
        description="Whether keys and tokens may come over the network without TLS: only behind something that encrypts.",
    )
    repository: Path | None = Field(
        None, description="Model repository: <name>/model.toml and <name>/<version>/model.pt."
    )
    watch_repository: bool = Field(
        default=False, description="Whether changes in the repository's folder are followed without being asked."
    )
    max_model_bytes: int = Field(
        0,
        ge=0,
        description="Most bytes of parameters and buffers of all models together on the device; 0 for no limit.",
    )
    unload_idle_models: bool = Field(
        default=False,
        description="Whether models that were not used for longest go for another one, where max_model_bytes leaves no room.",
    )
    plan_cache: Path | None = Field(
        Path("~/.cache/camserve/plans"),
        description="Folder of compiled plans, run as code: nobody else may write to it. Empty compiles at every start.",
    )
    max_archive_bytes: int = Field(
        8 << 30, ge=1 << 10, description="Largest model file, packed or by the sizes that its zip archive declares."
    )
    device: str = Field("auto", description="cpu, cuda or cuda:N; auto takes CUDA when there is a device.")
    torch_threads: int = Field(
        0,
        ge=0,
        description="Most threads of one pass on CPU, of which each model takes what serves it; 0 means all cores.",
    )
    slice_seconds: float = Field(
        0.020,
        gt=0,
        le=60,
        description="Longest piece of an amplified method that runs before others get their turn, unless one row takes longer.",
    )
    decode_threads: int = Field(0, ge=0, description="Threads that decode and encode; 0 takes one for each core.")
    max_batch_rows: int = Field(16, ge=1, le=1024, description="Most rows in one pass; a model's card may say less.")
    batch_window_seconds: float = Field(
        0.005, ge=0, le=1, description="How long a pass may wait for requests being decoded or about to come back."
    )
    max_pass_seconds: float = Field(
        0.5, gt=0, le=60, description="Rows join a pass only while it is predicted to take no longer than this."
    )
    interactive_weight: float = Field(
        6.0, gt=0, le=1000, description="Part of the device that the interactive lane gets while others wait."
    )
    standard_weight: float = Field(3.0, gt=0, le=1000, description="Likewise, of the standard lane.")
    bulk_weight: float = Field(1.0, gt=0, le=1000, description="Likewise, of the bulk lane.")
    max_requests: int = Field(256, ge=1, description="Most requests past the door at once; more are told to come back.")
    caller_requests_per_second: float = Field(
        0.0, ge=0, le=1e6, description="Most requests of one caller in a second, in the long run; 0 for no limit."
    )
    caller_burst: int = Field(
        0, ge=0, description="Most of them at once after a pause; 0 for as many as a second brings, at least one."
    )
    caller_concurrency: int | None = Field(
        None,
        ge=0,
        description="Most requests of one caller under way; 0 for no limit. Unset: three quarters of max_requests.",
    )
    max_held_bytes: int = Field(
        2 << 30,
        ge=1 << 20,
        description="Most bytes held for requests, by an upper estimate of each one's peak in decoding and encoding.",
    )
    max_queued_seconds: float = Field(
        120.0,
        gt=0,
        description="Most predicted device time that may wait in a request's lane and those above; more is told to come back.",
    )
    max_request_bytes: int = Field(64 << 20, ge=1 << 16, description="Largest request message.")
    max_image_pixels: int = Field(50_000_000, ge=1, description="Largest image, judged by its header before decoding.")
    max_specs: int = Field(32, ge=1, description="Most explanations in one request.")
    max_maps: int = Field(128, ge=1, description="Most maps in one request, over all its explanations.")
    receive_seconds: float = Field(
        60.0, gt=0, le=7200, description="Longest that a request may take to arrive once its call has begun."
    )
    write_seconds: float = Field(
        60.0,
        gt=0,
        description="Longest that one message may wait for its reader; then the call ends and frees its place.",
    )
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="A pass, chunk or call on the device that lasts longer counts as hanging; so does the event loop.",
    )
    keepalive_seconds: float = Field(
        60.0,
        ge=1,
        le=7200,
        description="A connection that was silent for so long is asked whether its caller is there.",
    )
    keepalive_timeout_seconds: float = Field(
        20.0, gt=0, le=7200, description="Without an answer for so long it is closed, and its requests are given up."
    )
    min_ping_seconds: float = Field(
        10.0, ge=0, le=7200, description="A caller that asks more often whether we are there is cut off."
    )
    max_connections: int = Field(
        4096, ge=1, description="Most connections at once, and never more than half of the files the process may open."
    )
    max_connection_streams: int = Field(
        256, ge=1, le=1 << 20, description="Most calls at once on one connection; clients hold further ones back."
    )
    max_metadata_bytes: int = Field(
        16 << 10, ge=1 << 10, le=1 << 24, description="Largest metadata of a call, names and credentials included."
    )
    handshake_seconds: float = Field(
        20.0, gt=0, le=7200, description="A connection that has not said what it wants for so long is closed."
    )
    idle_connection_seconds: float = Field(
        900.0, ge=0, description="A connection without a call for so long is closed; 0 for never."
    )
    connection_age_seconds: float = Field(
        0.0,
        ge=0,
        description="A connection this old takes no more calls, so that its caller connects anew; 0 for never.",
    )
    connection_age_grace_seconds: float = Field(
        300.0, ge=0, description="Calls on such a connection have so long to end; then they are cut off."
    )
    drain_delay_seconds: float = Field(
        5.0, ge=0, description="Between not ready and refusing: time for balancers to notice. 0 in tests."
    )
    drain_seconds: float = Field(30.0, ge=0, description="Time to finish accepted requests on shutdown.")
    log_format: Literal["console", "json"] = Field("console", description="Log lines for people or for machines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _address(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.field_name == "metrics_listen":
            return value
        if info.field_name == "listen" and value.startswith("unix:") and len(value) > len("unix:"):
            return value
        host, _, port = value.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or int(port) > _LARGEST_PORT:
            raise ValueError(f"{value!r} is not an address; write host:port, such as 0.0.0.0:50051 or [::]:50051")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.jwt_keys is not None and not self.jwt_audience:
            raise ValueError(
                "jwt_keys needs jwt_audience: tokens that were made for other services must not open this one"
            )
        if self.jwt_keys is None and (self.jwt_audience or self.jwt_issuer):
            # Who means tokens to be asked for must not get a server that asks for nothing.
            raise ValueError("jwt_audience and jwt_issuer need jwt_keys: without keys no token is read")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key come together: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key: only TLS asks clients for certificates")
        return self

    @field_validator("plan_cache", mode="before")
    @classmethod
    def _no_cache(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if value not in {"auto", "cpu", "cuda"} and not re.fullmatch(r"cuda:[0-9]+", value):
            raise ValueError(f"{value!r} is not a device; write auto, cpu, cuda or cuda:0")
        return value

    @property
    def decoders(self) -> int:
        """Number of decode threads, resolved."""
        return self.decode_threads or len(os.sched_getaffinity(0))

    @property
    def messages_at_once(self) -> int:
        """How many messages may be on their way in: should all be as large as allowed, they hold no more than requests may."""
        return max(_FEWEST_MESSAGES, self.max_held_bytes // self.max_request_bytes)

    @property
    def caller_limits(self) -> CallerLimits:
        """What a caller may take of whom nothing else is said, resolved: by itself no caller can take the whole door."""
        asked = self.caller_concurrency
        return CallerLimits(
            requests_per_second=self.caller_requests_per_second,
            burst=self.caller_burst,
            concurrency=max(1, self.max_requests * 3 // 4) if asked is None else asked,
        )

    @property
    def planner_limits(self) -> Limits:
        """What the planner keeps to."""
        return Limits(
            weights={
                Lane.INTERACTIVE: self.interactive_weight,
                Lane.STANDARD: self.standard_weight,
                Lane.BULK: self.bulk_weight,
            },
            window_seconds=self.batch_window_seconds,
            max_pass_seconds=self.max_pass_seconds,
            slice_seconds=self.slice_seconds,
        )


class SourceKind(enum.StrEnum):
    """Where a value comes from; the later ones win."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the value of one setting comes from.

    Attributes:
        kind: which of the places.
        place: path of the file, or name of the variable as it is written; empty for the others.
    """

    kind: SourceKind
    place: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourcedSettings:
    """Settings, and where each of them comes from."""

    settings: Settings
    sources: Mapping[str, Source]


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Builds settings as `load_sourced_settings` does, for those who do not ask where they come from."""
    return load_sourced_settings(config, **flags).settings


def load_sourced_settings(config: Path | None = None, **flags: Any) -> SourcedSettings:
    """Builds settings: flags over environment over configuration file over defaults.

    Args:
        config: a TOML file whose top-level keys are setting names.
        flags: values from the command line; None means not given.

    Raises:
        ValueError: the file is not TOML, or a setting is unknown or invalid; the text names it (pydantic's ValidationError is a
            ValueError). Unknown variables are let be: Kubernetes sets CAMSERVE_PORT and the like for a service named camserve.
    """
    from_file: dict[str, Any] = {}
    if config is not None:
        try:
            from_file = tomllib.loads(config.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{config} is not TOML: {error}") from error
    given = {name: value for name, value in flags.items() if value is not None}
    in_environment = {
        variable.upper(): variable for variable in os.environ
    }  # pydantic does not mind their case either.
    variables = {name: in_environment.get(f"CAMSERVE_{name.upper()}") for name in {*Settings.model_fields, *from_file}}
    kept = {name: value for name, value in from_file.items() if variables[name] is None}

    def source(name: str) -> Source:
        if name in given:
            return Source(kind=SourceKind.FLAG)
        if (variable := variables[name]) is not None:
            return Source(kind=SourceKind.ENVIRONMENT, place=variable)
        return Source(kind=SourceKind.FILE, place=str(config)) if name in kept else Source(kind=SourceKind.DEFAULT)

    settings = Settings(**{**kept, **given})
    return SourcedSettings(settings=settings, sources={name: source(name) for name in Settings.model_fields})


def complaint(error: Exception) -> str:
    """What a person is told of wrong settings: one line for each, with its name; pydantic's own text is for programmers."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "\n".join(map(_complaint, error.errors(include_url=False)))


def _complaint(found: ErrorDetails) -> str:
    name = ".".join(map(str, found["loc"]))
    if found["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Settings.model_fields, 1)
        return f"{name} is no setting{f'; did you mean {near[0]}?' if near else ''} (--print-config shows all)"
    what = found["msg"].removeprefix("Value error, ")
    if found["type"] != "value_error" and isinstance(found["input"], str | int | float):
        what += f", not {found['input']!r}"
    return f"{name}: {what}" if name else what

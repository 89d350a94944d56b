"""The repository's calls: what is listed, and which model, and version of it, is to be loaded or unloaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from camserve.server.errors import InvalidRequest, Reason, Unsupported
from camserve.server.models.repository import ModelState, Repository
from camserve.server.oip.messages import RepositoryIndexResponse
from camserve.server.oip.parameters import text, unknown, values

__all__ = ["Named", "index", "named"]

_STATES: Final[Mapping[ModelState, str]] = MappingProxyType(
    {
        ModelState.LOADING: "LOADING",
        ModelState.READY: "READY",
        ModelState.FAILED: "UNAVAILABLE",
        ModelState.UNLOADING: "UNLOADING",
        ModelState.UNLOADED: "UNAVAILABLE",
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Named:
    """What is to be loaded or unloaded; an empty version means what the model's policy asks for, or all."""

    model: str
    version: str


def index(repository: Repository, request: Any) -> Any:
    """A RepositoryIndexResponse.

    Raises:
        InvalidRequest: a repository is named, and there is only one.
    """
    if request.repository_name:
        raise _one_repository(request.repository_name)
    response = RepositoryIndexResponse()
    for slot in repository.slots():
        if slot.served is None and request.ready:
            continue
        reason = slot.error or ("unloaded" if slot.state is ModelState.UNLOADED else "")
        response.models.add(name=slot.name, version=slot.version, state=_STATES[slot.state], reason=reason)
    return response


def named(request: Any) -> Named:
    """What a RepositoryModelLoadRequest or RepositoryModelUnloadRequest names.

    Raises:
        InvalidRequest: no model, or a repository and a model; or a parameter is unknown.
        Unsupported: a model's files or configuration are sent along.
    """
    # KServe's dialect has the model's name where Triton's has the repository's.
    model = request.model_name or request.repository_name
    if request.model_name and request.repository_name:
        raise _one_repository(request.repository_name)
    if not model:
        raise InvalidRequest(
            Reason.FIELD_INVALID, "model_name is required; RepositoryIndex tells the names", field="model_name"
        )
    version = ""
    for name, given in request.parameters.items():
        field = f"parameters[{name}]"
        if name == "config" or name.startswith("file:"):
            raise Unsupported(
                Reason.FEATURE_NOT_IMPLEMENTED,
                f"{field}: models are loaded from the server's repository as they are there; put a model.toml beside the file",
                field=field,
            )
        if name == "version":
            version = text(values({name: given}, "parameters")[name], field)
        elif name != "unload_dependents":  # No model here depends on another.
            raise unknown("parameter", name, ("version", "unload_dependents"), field)
    return Named(model, version)


def _one_repository(name: str) -> InvalidRequest:
    return InvalidRequest(
        Reason.FIELD_INVALID,
        f"repository_name is {name!r}, but this server has one repository, without a name; leave it empty",
        field="repository_name",
    )

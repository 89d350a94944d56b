"""Builds eager models by name: torchvision's, timm's, or an allow-listed function of the operator's own.

Arrives: a name and exactly one source of weights. Leaves: an `EagerProgram`, or the module alone. The loader calls this for
`model.toml` and for `camserve serve --model`, `camserve models export` for what it writes; names from requests never come here,
since importing a module runs its code.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.look import message_of
from camserve.server.errors import InvalidRequest, NotFound, Reason, Unsupported

__all__ = ["build_module", "load_factory"]


def load_factory(  # noqa: PLR0913 - each is a setting of its own in model.toml.
    name: str,
    *,
    weights: Path | None = None,
    random_seed: int | None = None,
    pretrained: bool = False,
    allowed_imports: Sequence[str] = (),
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
) -> EagerProgram:
    """Builds a model as `build_module` does, and makes a program of it on `device` that computes in `dtype`."""
    module = build_module(
        name,
        weights=weights,
        random_seed=random_seed,
        pretrained=pretrained,
        allowed_imports=allowed_imports,
        options=options,
    )
    return EagerProgram(module, device=device, dtype=dtype)


def build_module(
    name: str,
    *,
    weights: Path | None = None,
    random_seed: int | None = None,
    pretrained: bool = False,
    allowed_imports: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a model and gives it its weights. Exactly one of `weights`, `random_seed` and `pretrained` is named.

    The global random state is as before when this returns.

    Args:
        name: `torchvision:resnet50`, `timm:convnext_tiny`, or `package.module:function`.
        weights: a `.safetensors` file, or a state dict written by `torch.save`; read without running code from it.
        random_seed: initialises the model as its library does, from this seed.
        pretrained: the weights the library publishes, downloaded if it must; for an import path, those the function returns.
        allowed_imports: `package.module:function`, or `package.module` for all its functions.
        options: keyword arguments of the factory, such as `num_classes`.

    Raises:
        InvalidRequest: no or several sources of weights, an unreadable file, or weights of another architecture.
        NotFound: no model of this name, or no such file; near names are listed.
        Unsupported: the import path is not allowed, or timm is not installed.
    """
    _check_one_source(name, weights=weights, random_seed=random_seed, is_pretrained=pretrained)
    build = _builder(name, dict(options or {}), allowed_imports, is_pretrained=pretrained)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed every CUDA device, and those are not put back.
        torch.default_generator.manual_seed(random_seed or 0)
        module = build()
    if not isinstance(module, nn.Module):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"factory '{name}' returned a {type(module).__name__}, not an nn.Module",
            metadata={"factory": name},
        )
    if weights is not None:
        _load_weights(name, module, weights)
    return module


def _check_one_source(name: str, *, weights: Path | None, random_seed: int | None, is_pretrained: bool) -> None:
    named = [
        source
        for source, is_named in (
            ("weights", weights is not None),
            ("random_seed", random_seed is not None),
            ("pretrained", is_pretrained),
        )
        if is_named
    ]
    if len(named) != 1:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"model '{name}' names {' and '.join(named) or 'no source of weights'}; "
            "name exactly one: weights (a file), random_seed (for benchmarks) or pretrained",
            metadata={"factory": name, "sources": ", ".join(named)},
        )


def _builder(
    name: str, options: dict[str, Any], allowed_imports: Sequence[str], *, is_pretrained: bool
) -> Callable[[], Any]:
    """Finds what builds the model, without building it."""
    library, _, rest = name.partition(":")
    if not library or not rest:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"'{name}' is not a factory; write 'torchvision:resnet50', 'timm:convnext_tiny' or 'package.module:function'",
            metadata={"factory": name},
        )
    if library == "torchvision":
        return _torchvision_builder(rest, options, is_pretrained=is_pretrained)
    if library == "timm":
        return _timm_builder(rest, options, is_pretrained=is_pretrained)
    return functools.partial(_imported(name, library, rest, allowed_imports), **options)


def _torchvision_builder(model: str, options: dict[str, Any], *, is_pretrained: bool) -> Callable[[], Any]:
    import torchvision  # noqa: PLC0415 - it takes seconds to import, and servers of archives need none of it

    known = torchvision.models.list_models()
    if model not in known:
        raise _unknown("torchvision", model, known)
    accepted = inspect.signature(torchvision.models.get_model_builder(model)).parameters
    if "weights_backbone" in accepted:
        options.setdefault("weights_backbone", None)  # Else segmentation and detection models download one.
    if model in {"googlenet", "inception_v3"} and not is_pretrained:
        options.setdefault("init_weights", True)  # They warn when left to their default.
    return functools.partial(
        torchvision.models.get_model, model, weights="DEFAULT" if is_pretrained else None, **options
    )


def _timm_builder(model: str, options: dict[str, Any], *, is_pretrained: bool) -> Callable[[], Any]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise Unsupported(
            Reason.FEATURE_NOT_IMPLEMENTED,
            f"model 'timm:{model}' needs the package timm, which is not installed here",
            metadata={"factory": f"timm:{model}"},
        ) from error
    known = timm.list_models()
    if model.partition(".")[0] not in known:  # After the dot comes which weights.
        raise _unknown("timm", model, known)
    return functools.partial(timm.create_model, model, pretrained=is_pretrained, **options)


def _imported(name: str, module: str, function: str, allowed_imports: Sequence[str]) -> Callable[..., Any]:
    if name not in allowed_imports and module not in allowed_imports:
        raise Unsupported(
            Reason.FEATURE_NOT_IMPLEMENTED,
            f"importing '{name}' is not allowed; allowed: {', '.join(allowed_imports) or 'nothing'}",
            metadata={"factory": name, "allowed": ", ".join(allowed_imports)},
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise NotFound(
            Reason.MODEL_NOT_FOUND, f"cannot import '{name}': {error}", metadata={"factory": name}
        ) from error
    if not callable(found):
        raise InvalidRequest(
            Reason.FIELD_INVALID, f"'{name}' is not a function but a {type(found).__name__}", metadata={"factory": name}
        )
    return cast("Callable[..., Any]", found)


def _unknown(library: str, model: str, known: Sequence[str]) -> NotFound:
    near = difflib.get_close_matches(model, known, n=5, cutoff=0.5)
    return NotFound(
        Reason.MODEL_NOT_FOUND,
        f"{library} has no model '{model}'; near names: {', '.join(near) or 'none'}",
        metadata={"factory": f"{library}:{model}", "near": ", ".join(near)},
    )


def _load_weights(name: str, module: nn.Module, path: Path) -> None:
    """Copies a state dict into the module; every name and shape must fit."""
    try:
        module.load_state_dict(_read_state(path))
    except RuntimeError as error:
        # The first line only says that it failed; names and shapes follow.
        details = " ".join(line.strip() for line in str(error).splitlines()[1:4]) or str(error)
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"the weights in {path} are not of '{name}': {details[:500]}",
            metadata={"factory": name, "file": path},
        ) from error


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise NotFound(Reason.MODEL_NOT_FOUND, f"there is no file {path}", metadata={"file": path})
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"cannot read weights from {path}: {message_of(error)}; save model.state_dict() as .safetensors or with torch.save",
            metadata={"file": path},
        ) from error
    # Training scripts often wrap the state dict together with their own state.
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidRequest(
            Reason.FIELD_INVALID, f"{path} holds no state dict: tensors by name are expected", metadata={"file": path}
        )
    return state

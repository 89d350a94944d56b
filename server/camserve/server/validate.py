"""Job against model card: what the grammar allows but this model does not.

Called by `service.py` after `wire.requests`, on the event loop; pure. Raises with the path of the field at fault, says what is
allowed, and costs nothing that grows with the image.
"""

from __future__ import annotations

import dataclasses
import difflib

from camserve.server import jobs
from camserve.server.cam.methods import METHODS
from camserve.server.errors import InvalidRequest, NotFound, Reason, Unsupported
from camserve.server.models.card import ModelCard

__all__ = ["RequestLimits", "check_job", "check_size"]

# A name may be as long as a message; finding near ones takes time that grows with it, and this is the event loop.
_COMPARED_CHARACTERS = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How much one request may ask for."""

    max_specs: int
    max_maps: int


def check_size(specs: int, limits: RequestLimits) -> None:
    """Refuses a request with too many specs; asked before they are read, because reading is what they would cost.

    Raises:
        InvalidRequest: more than the limit.
    """
    if specs > limits.max_specs:
        raise InvalidRequest(
            Reason.TOO_MANY_SPECS,
            f"{specs} specs are more than the {limits.max_specs} this server takes; send several requests",
            field="specs",
            metadata={"specs": specs, "limit": limits.max_specs},
        )


def check_job(job: jobs.Job, card: ModelCard, limits: RequestLimits) -> None:
    """Refuses a job that the model cannot carry out.

    Raises:
        CamserveError: with the field at fault and what would be right.
    """
    if not 1 <= job.top_k <= card.class_count:
        raise _out_of_range("top_k", job.top_k, 1, card.class_count, card)
    maps = 0
    for spec in job.specs:
        field = f"specs[{spec.index}]"
        _check_method(spec, card, field)
        _check_profile(spec, field)
        for place, name in enumerate(spec.layers):
            _check_layer(name, spec, card, f"{field}.layers[{place}]")
            if any(name in card.spellings(other) for other in spec.layers[:place]):
                raise InvalidRequest(
                    Reason.FIELD_INVALID,
                    f"{field}.layers[{place}] names {name!r} again; name each layer once",
                    field=f"{field}.layers[{place}]",
                    metadata={"layer": name},
                )
        maps += _check_target(spec.target, card, f"{field}.target")
        _check_rendering(spec, job.payload, f"{field}")
    if maps > limits.max_maps:
        raise InvalidRequest(
            Reason.TOO_MANY_SPECS,
            f"the specs ask for {maps} maps, more than the {limits.max_maps} this server makes in one request",
            field="specs",
            metadata={"maps": maps, "limit": limits.max_maps},
        )


def _check_method(spec: jobs.Spec, card: ModelCard, field: str) -> None:
    method = card.method(spec.method)
    if method is None or method.works:
        return
    working = ", ".join(entry.slug for entry in card.methods if entry.works) or "none"
    raise Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"{spec.method} does not work on model {card.name!r} ({card.kind}): {method.note}; methods that do: {working}",
        field=f"{field}.method",
        metadata={"method": spec.method, "model": card.name},
    )


def _check_profile(spec: jobs.Spec, field: str) -> None:
    if spec.profile in METHODS[spec.method].absent_from:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field}.profile {spec.profile} has no {spec.method}: that library does not offer it; use profile paper",
            field=f"{field}.profile",
            metadata={"method": spec.method, "profile": spec.profile},
        )


def _check_layer(name: str, spec: jobs.Spec, card: ModelCard, field: str) -> None:
    layer = card.layer(name)
    if layer is None:
        raise NotFound(
            Reason.LAYER_NOT_FOUND,
            f"layer {name!r} is not in model {card.name!r}; {_near(name, card)}",
            field=field,
            metadata={"layer": name, "model": card.name},
        )
    if layer.refusal:
        raise Unsupported(
            Reason.LAYER_UNUSABLE,
            f"layer {name!r} of model {card.name!r} ({card.kind}) gives no map: {layer.refusal}; "
            f"{_near(card.default_layer, card)}",
            field=field,
            metadata={"layer": name, "model": card.name},
        )
    method = card.method(spec.method)
    if method is not None and method.only_layers and name not in method.only_layers:
        raise Unsupported(
            Reason.METHOD_UNSUPPORTED_BY_MODEL,
            f"{spec.method} works on model {card.name!r} only at {', '.join(method.only_layers)}, not at {name!r}: {method.note}",
            field=field,
            metadata={"method": spec.method, "layer": name, "model": card.name},
        )


def _near(name: str, card: ModelCard) -> str:
    usable = [layer.name for layer in card.layers if not layer.refusal]
    near = difflib.get_close_matches(name[:_COMPARED_CHARACTERS], usable, n=5, cutoff=0.5)
    return (
        f"near names: {', '.join(near)}; default: {card.default_layer}; the card lists all {len(usable)}"
        if near
        else f"default: {card.default_layer}; {_some(usable)}"
    )


def _some(layers: list[str]) -> str:
    blocks = [name for name in layers if "." not in name] or layers
    return f"the card lists all {len(layers)}, such as {', '.join(blocks[:8])}"


def _check_target(target: jobs.Target, card: ModelCard, field: str) -> int:
    """Returns how many maps the target gives."""
    match target.kind:
        case jobs.TargetKind.PREDICTED:
            return 1
        case jobs.TargetKind.CLASS_INDEX:
            if not 0 <= target.value < card.class_count:
                raise _out_of_range(f"{field}.class_index", target.value, 0, card.class_count - 1, card)
            return 1
        case jobs.TargetKind.KTH:
            if not 1 <= target.value <= card.class_count:
                raise _out_of_range(f"{field}.kth.k", target.value, 1, card.class_count, card)
            return 1
        case jobs.TargetKind.TOP_K:
            if not 1 <= target.value <= card.class_count:
                raise _out_of_range(f"{field}.top.k", target.value, 1, card.class_count, card)
            return target.value


def _out_of_range(field: str, value: int, low: int, high: int, card: ModelCard) -> InvalidRequest:
    return InvalidRequest(
        Reason.CLASS_OUT_OF_RANGE,
        f"{field} must be from {low} to {high} for model {card.name!r} with {card.class_count} classes, is {value}",
        field=field,
        metadata={"value": value, "lowest": low, "highest": high, "model": card.name},
    )


def _check_rendering(spec: jobs.Spec, payload: jobs.JobInput, field: str) -> None:
    if not isinstance(payload, jobs.TensorInput):
        return
    if spec.encoding.startswith("overlay"):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field}.encoding {spec.encoding} needs an image to draw on; send image or frame, or take a map encoding",
            field=f"{field}.encoding",
        )
    if spec.size is jobs.MapSize.SOURCE:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field}.size source needs an image; a tensor has no source pixels: take layer or input",
            field=f"{field}.size",
        )

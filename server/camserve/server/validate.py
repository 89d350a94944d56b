"""Job against model card: what the grammar allows but this model does not.

Called by `service.py` after `wire.requests`, on the event loop; pure. Raises with the path of the field at fault, says what is
allowed, and costs nothing that grows with the image.
"""

from __future__ import annotations

import dataclasses
import difflib

from camserve.server import jobs
from camserve.server.cam.methods import METHODS, Need
from camserve.server.errors import InvalidRequest, NotFound, Reason, Unsupported
from camserve.server.method_rules import check_method, maps_for_each_target
from camserve.server.models.card import ExtraInput, ModelCard
from camserve.server.target_rules import check_target
from camserve.server.tensors import check_tensor

__all__ = ["RequestLimits", "check_job", "check_rendering", "check_size", "check_spec", "most_maps"]

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
    _check_top_k(job.top_k, card)
    _check_extra_inputs(job, card)
    if job.region_of_interest is not None and isinstance(job.payload, jobs.TensorInput):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            "region_of_interest is a part of a picture, and a tensor is the model's whole input; leave it out",
            field="region_of_interest",
        )
    maps = 0
    for spec in job.specs:
        field = f"specs[{spec.index}]"
        maps += check_spec(spec, card, field)
        check_rendering(spec, job.payload, field)
    if maps > limits.max_maps:
        raise InvalidRequest(
            Reason.TOO_MANY_SPECS,
            f"the specs may give {maps} maps, more than the {limits.max_maps} this server makes in one request; ask about fewer "
            "classes, steps or concepts, or send several requests",
            field="specs",
            metadata={"maps": maps, "limit": limits.max_maps},
        )


def check_spec(spec: jobs.Spec, card: ModelCard, field: str) -> int:
    """Refuses a spec that the model cannot carry out, whatever it is shown.

    Args:
        spec: read.
        card: of the model.
        field: path of the spec, for errors.

    Returns:
        The most maps that it can give.

    Raises:
        CamserveError: with the field at fault and what would be right.
    """
    check_method(spec, card, field)
    _check_layers(spec, card, field)
    return _most_maps(spec, card, field)


def _check_top_k(top_k: int, card: ModelCard) -> None:
    if card.output_kind in (jobs.OutputKind.DETECTION, jobs.OutputKind.EMBEDDING):
        # Nothing that is listed has a number known before the pass.
        if top_k < 1:
            raise InvalidRequest(Reason.FIELD_INVALID, f"top_k must be at least 1, is {top_k}", field="top_k")
    elif not 1 <= top_k <= card.class_count:
        raise InvalidRequest(
            Reason.CLASS_OUT_OF_RANGE,
            f"top_k must be from 1 to {card.class_count} for model {card.name!r} with {card.class_count} classes, is {top_k}",
            field="top_k",
            metadata={"value": top_k, "lowest": 1, "highest": card.class_count, "model": card.name},
        )


def _check_extra_inputs(job: jobs.Job, card: ModelCard) -> None:
    wanted = {entry.name: entry for entry in card.extra_inputs}
    if job.extra_inputs.keys() != wanted.keys():
        takes = ", ".join(map(_described, card.extra_inputs)) or "no input besides the first"
        sent = ", ".join(sorted(job.extra_inputs)) or "none"
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"extra_inputs must be those of model {card.name!r}, which takes {takes}; sent: {sent}",
            field="extra_inputs",
            metadata={"sent": sent, "expected": takes, "model": card.name},
        )
    for name, tensor in job.extra_inputs.items():
        field = f"extra_inputs[{name}]"
        if tensor.shape != wanted[name].shape:
            raise InvalidRequest(
                Reason.TENSOR_MISMATCH,
                f"{field} is {tensor.dtype} {tensor.shape}; model {card.name!r} takes {_described(wanted[name])}",
                field=field,
                metadata={"shape": tensor.shape, "expected": wanted[name].shape, "model": card.name},
            )
        try:
            check_tensor(tensor)
        except InvalidRequest as error:
            error.at(field)
            raise


def _described(extra: ExtraInput) -> str:
    return f"{extra.name} ({extra.dtype} {extra.shape})"


def _check_layers(spec: jobs.Spec, card: ModelCard, field: str) -> None:
    for place, name in enumerate(spec.layers):
        _check_layer(name, spec, card, f"{field}.layers[{place}]")
        if any(name in card.spellings(other) for other in spec.layers[:place]):
            raise InvalidRequest(
                Reason.FIELD_INVALID,
                f"{field}.layers[{place}] names {name!r} again; name each layer once",
                field=f"{field}.layers[{place}]",
                metadata={"layer": name},
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
            f"{spec.method} gives no map at layer {name!r} of model {card.name!r} ({card.kind}): {layer.refusal}; "
            f"{_near(card.default_layer, card)}",
            field=field,
            metadata={"layer": name, "model": card.name},
        )
    if layer.gradient_refusal and METHODS[spec.method].needs & {Need.GRADIENT, Need.CURVATURE}:
        raise Unsupported(
            Reason.LAYER_UNUSABLE,
            f"{spec.method} gives no map at layer {name!r} of model {card.name!r} ({card.kind}): {layer.gradient_refusal}; "
            f"{_near(card.default_layer, card)}",
            field=field,
            metadata={"method": spec.method, "layer": name, "model": card.name},
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


def check_rendering(spec: jobs.Spec, payload: jobs.JobInput, field: str) -> None:
    """Refuses a form of map that this kind of input has not.

    Raises:
        InvalidRequest: it needs a source image, and a tensor has none.
    """
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


def most_maps(spec: jobs.Spec, card: ModelCard) -> int:
    """The most maps that a valid spec can give."""
    return _most_maps(spec, card, f"specs[{spec.index}]")


def _most_maps(spec: jobs.Spec, card: ModelCard, field: str) -> int:
    targets = check_target(spec.target, card, f"{field}.target") if METHODS[spec.method].has_target else 1
    return targets * maps_for_each_target(spec)

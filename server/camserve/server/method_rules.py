"""What a method reads, and so what a spec may say to it: its target, layers, parameters, smoothing and saliency.

`validate.py` calls `check_method` on the event loop. An option that a method would not read is refused rather than ignored: a
caller who set it would take the map for something it is not.
"""

from __future__ import annotations

import dataclasses

from camserve.server import jobs
from camserve.server.cam.methods import METHODS, Amplified, Arithmetic, Layerwise, Method, Reads, WorkClass
from camserve.server.errors import InvalidRequest, Reason, Unsupported
from camserve.server.models.card import ModelCard

__all__ = ["check_method", "map_rank", "maps_for_each_target"]

_CELLS = (jobs.Encoding.FLOAT32, jobs.Encoding.FLOAT16, jobs.Encoding.UINT8)
_WIRE_NAMES = {"allows_partial": "allow_partial"}


def check_method(spec: jobs.Spec, card: ModelCard, field: str) -> None:
    """Refuses what the method cannot do on this model, or would not read.

    Args:
        spec: of a method in the table.
        card: of the model.
        field: path of the spec in the request.

    Raises:
        Unsupported: the method does not work on this model.
        InvalidRequest: an option that the method does not read; the message tells those it does.
    """
    method = METHODS[spec.method]
    _check_works(spec, card, field)
    if spec.profile in method.absent_from:
        raise _refused(
            f"{field}.profile",
            f"{spec.profile} has no {method.slug}: that library lacks it, or computes something else by that name; "
            "use profile paper",
            method,
            profile=spec.profile,
        )
    if not method.has_target and spec.target != jobs.Target():
        raise _refused(
            f"{field}.target",
            f"must be unset for {method.slug}: it makes one map, about no class; methods with a target: "
            + ", ".join(slug for slug, known in METHODS.items() if known.has_target),
            method,
        )
    if spec.layers and method.reads is not Reads.LAYERS:
        raise _refused(
            f"{field}.layers", f"must be empty for {method.slug}, which looks at {_PLACES[method.reads]}", method
        )
    _check_parameters(spec, method, f"{field}.parameters")
    _check_smoothing(spec, method, f"{field}.smoothing")
    _check_channels(spec, method, field)
    _check_regions(spec, card, f"{field}.regions")


_PLACES = {
    Reads.INPUT: "the model's input",
    Reads.BIASES: "the input and every layer that adds a constant",
    Reads.ATTENTION: "every attention of the model",
}


def maps_for_each_target(spec: jobs.Spec) -> int:
    """How many maps the method gives for each thing it is asked about: one, unless it draws concepts."""
    arithmetic = METHODS[spec.method].under(spec.profile)
    if isinstance(arithmetic, Amplified) and arithmetic.maps is not None:
        return arithmetic.maps(spec.parameters)
    return 1


def map_rank(spec: jobs.Spec, card: ModelCard) -> int:
    """Over how many axes of space the spec's map extends: 1 for signals, 2 for images, 3 for volumes."""
    layers = [card.layer(name) for name in spec.layers]
    ranks = {len(layer.map_shape) for layer in layers if layer is not None and layer.map_shape}
    if len(ranks) == 1 and not _has_channels(METHODS[spec.method].under(spec.profile)):
        return ranks.pop()
    return len(card.recipe.shape) - 1


def _check_works(spec: jobs.Spec, card: ModelCard, field: str) -> None:
    told = card.method(spec.method)
    if told is None or told.works:
        return
    working = ", ".join(entry.slug for entry in card.methods if entry.works) or "none"
    raise Unsupported(
        Reason.METHOD_UNSUPPORTED_BY_MODEL,
        f"{spec.method} does not work on model {card.name!r} ({card.kind}): {told.note}; methods that do: {working}",
        field=f"{field}.method",
        metadata={"method": spec.method, "model": card.name},
    )


def _check_parameters(spec: jobs.Spec, method: Method, field: str) -> None:
    readable = set(method.parameters) | ({"allows_partial"} if method.work is WorkClass.AMPLIFIED else set())
    for option in dataclasses.fields(jobs.Parameters):
        if getattr(spec.parameters, option.name) != option.default and option.name not in readable:
            known = ", ".join(sorted(_WIRE_NAMES.get(name, name) for name in readable)) or "no parameters"
            asked = _WIRE_NAMES.get(option.name, option.name)
            raise _refused(
                f"{field}.{asked}",
                f"is not read by {method.slug}, which reads {known}",
                method,
                known=known,
                parameter=asked,
            )


def _check_smoothing(spec: jobs.Spec, method: Method, field: str) -> None:
    if spec.smoothing.eigen and not method.can_smooth_eigen:
        able = ", ".join(slug for slug, known in METHODS.items() if known.can_smooth_eigen) or "none"
        raise _refused(
            f"{field}.eigen",
            f"cannot smooth {method.slug}: there is no sum over weighted channels in it; methods that have one: {able}",
            method,
        )
    if spec.smoothing.augmentation and not isinstance(method.under(spec.profile), Layerwise):
        able = ", ".join(slug for slug, known in METHODS.items() if isinstance(known.arithmetic, Layerwise))
        raise _refused(
            f"{field}.augmentation",
            f"cannot smooth {method.slug}: its map is not made layer by layer; methods whose maps are: {able}",
            method,
        )


def _has_channels(arithmetic: Arithmetic) -> bool:
    return not isinstance(arithmetic, Layerwise) and arithmetic.has_channels


def _check_channels(spec: jobs.Spec, method: Method, field: str) -> None:
    if not _has_channels(method.under(spec.profile)):
        if spec.saliency is not jobs.Saliency.COLOUR:
            able = ", ".join(slug for slug, known in METHODS.items() if _has_channels(known.arithmetic)) or "none"
            raise _refused(
                f"{field}.saliency",
                f"must be unset for {method.slug}: its map has no channels; methods with them: {able}",
                method,
            )
        return
    if spec.saliency is not jobs.Saliency.COLOUR:
        return
    advice = "take saliency gray, positive or negative for a map without channels"
    if spec.encoding not in _CELLS:
        raise _refused(
            f"{field}.encoding",
            f"must be {', '.join(_CELLS[:-1])} or {_CELLS[-1]} for signed channels, is {spec.encoding}; {advice}",
            method,
        )
    if spec.size is not jobs.MapSize.LAYER:
        raise _refused(f"{field}.size", f"must be layer for signed channels, is {spec.size}; {advice}", method)
    if spec.regions is not None:
        raise _refused(f"{field}.regions", f"cannot be found among signed channels; {advice}", method)


def _check_regions(spec: jobs.Spec, card: ModelCard, field: str) -> None:
    rank = map_rank(spec, card)
    if spec.regions is not None and rank != 2:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field} are boxes in pictures; a map of {rank} dimensions has none: leave them out and threshold it yourself",
            field=field,
            metadata={"dimensions": rank, "model": card.name},
        )


def _refused(field: str, said: str, method: Method, **metadata: object) -> InvalidRequest:
    return InvalidRequest(
        Reason.FIELD_INVALID, f"{field} {said}", field=field, metadata={"method": method.slug, **metadata}
    )

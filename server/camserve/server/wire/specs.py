"""`Spec` messages to `jobs.Spec`: one requested explanation, its words looked up and its numbers held to their bounds.

Called by `requests.py`, and by `tables.py` for specs of a card. A method of the contract that the table of methods lacks is
refused here, and nothing else is: every other option is built, and whether this model can do it is `validate.py`'s business.
"""

from __future__ import annotations

from camserve.server import jobs
from camserve.server.cam.methods import METHODS, Method, Reads
from camserve.server.errors import Reason, Unsupported
from camserve.server.models.card import ModelCard
from camserve.server.wire import words
from camserve.server.wire.fields import at_least, finite, invalid, open_share, share
from camserve.server.wire.targets import read_target
from camserve.v1 import spec_pb2

__all__ = ["read_spec"]


def read_spec(index: int, spec: spec_pb2.Spec, card: ModelCard, field: str = "") -> jobs.Spec:
    """One explanation; where it names no layers, those methods that read layers get the card's default.

    Args:
        index: its place in the request.
        spec: as it came.
        card: of the model.
        field: its path, for errors; that in the request unless told.

    Raises:
        CamserveError: a field is missing or wrong, or the method is not built yet.
    """
    field = field or f"specs[{index}]"
    method = _method(spec, field)
    encoding = words.word(words.ENCODINGS, spec.encoding, f"{field}.encoding")
    default_layers = (card.default_layer,) if method.reads is Reads.LAYERS else ()
    return jobs.Spec(
        index=index,
        method=method.slug,
        layers=tuple(spec.layers) or default_layers,
        target=read_target(spec.target, card, f"{field}.target"),
        profile=words.word(words.PROFILES, spec.profile, f"{field}.profile"),
        fusion=words.word(words.FUSIONS, spec.fusion, f"{field}.fusion"),
        rectify=spec.rectify if spec.HasField("rectify") else None,
        normalisation=words.word(words.NORMALISATIONS, spec.normalisation, f"{field}.normalisation"),
        size=_size(spec, encoding, field),
        encoding=encoding,
        overlay_opacity=share(spec.overlay_opacity, f"{field}.overlay_opacity")
        if spec.HasField("overlay_opacity")
        else 0.5,
        parameters=_parameters(spec.parameters, f"{field}.parameters"),
        smoothing=jobs.Smoothing(augmentation=spec.smoothing.augmentation, eigen=spec.smoothing.eigen),
        saliency=words.word(words.SALIENCIES, spec.saliency, f"{field}.saliency"),
        regions=_regions(spec.regions, f"{field}.regions") if spec.HasField("regions") else None,
    )


def _method(spec: spec_pb2.Spec, field: str) -> Method:
    slug = words.word(words.METHODS, spec.method, f"{field}.method")
    if slug not in METHODS:
        raise Unsupported(
            Reason.METHOD_NOT_IMPLEMENTED,
            f"method {slug} is not built yet; built are: {', '.join(METHODS)}",
            field=f"{field}.method",
            metadata={"method": slug},
        )
    return METHODS[slug]


def _size(spec: spec_pb2.Spec, encoding: jobs.Encoding, field: str) -> jobs.MapSize:
    size = words.word(words.SIZES, spec.size, f"{field}.size")
    if not encoding.startswith("overlay"):
        return size
    if spec.size not in (spec_pb2.MAP_SIZE_UNSPECIFIED, spec_pb2.MAP_SIZE_SOURCE):
        raise invalid(f"{field}.size", f"must be source or unset for an overlay, is {size}")
    return jobs.MapSize.SOURCE


_COUNTS = ("channels", "samples", "steps", "window", "stride", "concepts", "similar_classes")
# Masks are drawn and nodes are found before the first chunk of work: what they take grows with these, in memory too.
_MOST = {"samples": 10_000, "steps": 1_000}


def _parameters(parameters: spec_pb2.Parameters, field: str) -> jobs.Parameters:
    asked = {name: getattr(parameters, name) for name in (*_COUNTS, "noise", "contrast") if parameters.HasField(name)}
    for name, value in asked.items():
        if name in _COUNTS:
            at_least(1, value, f"{field}.{name}")
            if value > _MOST.get(name, value):
                raise invalid(f"{field}.{name}", f"must be at most {_MOST[name]}, is {value}")
        else:
            finite(value, f"{field}.{name}")
    if asked.get("noise", 0) < 0:
        raise invalid(f"{field}.noise", f"must be at least 0, is {asked['noise']}")
    return jobs.Parameters(**asked, seed=parameters.seed, allows_partial=parameters.allow_partial)


def _regions(regions: spec_pb2.RegionOptions, field: str) -> jobs.RegionOptions:
    return jobs.RegionOptions(
        threshold=open_share(regions.threshold, f"{field}.threshold"),
        max_regions=at_least(1, regions.max_regions, f"{field}.max_regions")
        if regions.HasField("max_regions")
        else None,
    )

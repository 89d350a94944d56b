"""What is answered: maps as the engine leaves them, predictions and heatmaps as they are sent, and what it took."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from camserve.server.errors import CamserveError
from camserve.server.jobs.inputs import Box, FloatArray, Geometry
from camserve.server.jobs.readings import Detection, Reading
from camserve.server.jobs.specs import Job
from camserve.server.jobs.words import Compression, Encoding, MapFlag, Polarity, Profile, RuleOutcome, Score

__all__ = [
    "ClassScore",
    "Event",
    "HeatRegion",
    "Heatmap",
    "PassFacts",
    "Prediction",
    "RawMap",
    "ResolvedTarget",
    "RuleVerdict",
    "SpecFailed",
    "Summary",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedTarget:
    """What a map turned out to be about.

    Attributes:
        class_index: index into the model's outputs; None where it is about no class.
        score: logit, softmax or ReST.
        value: that score, as differentiated, before polarity.
        rank: place among the maps of its spec, from 0.
        count: how many maps the spec gives.
        polarity: evidence for or against.
        other_class_index: of a difference, the class argued against; of several, the first.
        step: of a sequence, from 0.
        cells: of a dense output, how many were summed.
        box: of a detection, where the model found it, in pixels of its input.
        iou: of a detection, its overlap with the box asked about.
        concept: of a factorisation, which concept, from 0.
        phrase: what a phrase target said.
    """

    class_index: int | None
    score: Score
    value: float
    rank: int = 0
    count: int = 1
    polarity: Polarity = Polarity.FOR
    other_class_index: int | None = None
    step: int | None = None
    cells: int | None = None
    box: Box | None = None
    iou: float | None = None
    concept: int | None = None
    phrase: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RawMap:
    """A map as the engine leaves it.

    Attributes:
        spec_index: which spec asked for it.
        target: the class it is about.
        values: (h w), or (t) or (d h w), float32, at the resolution of the layer (the finest of several), finite.
        raw_min: smallest value before rectification and normalisation; of several layers, of the map they were fused into.
        raw_max: largest value, likewise.
        flags: what a reader must know.
        layers: the taps used, call indices as asked.
        device_seconds: device time spent on this map alone: post-processing, and the passes of an amplified method.
        has_channels: whether the last axis of `values` is the input's channels, not space.
        completed: share of an amplified method's work that was done; less than 1 only with PARTIAL.
    """

    spec_index: int
    target: ResolvedTarget
    values: FloatArray
    raw_min: float
    raw_max: float
    flags: frozenset[MapFlag]
    layers: tuple[str, ...]
    device_seconds: float = 0.0
    has_channels: bool = False
    completed: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One line of a prediction; `step` only for sequences."""

    class_index: int
    label: str
    logit: float
    probability: float
    step: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the model said: best class first; detections, best first; an embedding; and all of it as the engine read it."""

    classes: tuple[ClassScore, ...] = ()
    detections: tuple[Detection, ...] = ()
    embedding: tuple[float, ...] = ()
    reading: Reading | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeatRegion:
    """A connected part of a map where the evidence is strong.

    Attributes:
        box: on the source, or in cells of the map where there is no image.
        peak: largest value in it.
        share: of the map's positive total that lies in it, 0 to 1.
    """

    box: Box
    peak: float
    share: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """A map as it is sent.

    Attributes:
        raw: the map before resizing and encoding, for its target, range and flags.
        label: name of the class it is about.
        method: slug.
        profile: conventions followed.
        shape: of the decoded payload: (h w), or (h w 3) for an overlay.
        axes: names of those dimensions.
        encoding: how to read `payload`.
        compression: whether to inflate it first.
        payload: the bytes.
        value_min: the value that the lowest code stands for (uint8, PNG); else the smallest value sent.
        value_max: the value that the highest code stands for; else the largest.
        geometry: map cells onto source pixels: `x_source = scale_x * column + offset_x`; None where there is no image.
        raw_sha256: of the map as little-endian float32 at layer resolution, after rectification and normalisation.
        payload_sha256: of the payload before compression.
        encode_seconds: time in the encoder.
        regions: boxes around the strongest evidence, strongest first, if the spec asked for them.
        rule: name of the rule that asked for it; empty for a spec of the caller's.
    """

    raw: RawMap
    label: str
    method: str
    profile: Profile
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    encoding: Encoding
    compression: Compression
    payload: bytes
    value_min: float
    value_max: float
    geometry: Geometry | None
    raw_sha256: bytes
    payload_sha256: bytes
    encode_seconds: float = 0.0
    regions: tuple[HeatRegion, ...] = ()
    rule: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpecFailed:
    """One explanation that could not be made; the others go on. `rule` names the rule that asked for it, if one did."""

    spec_index: int
    error: CamserveError
    rule: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuleVerdict:
    """What became of one rule of the model."""

    rule: str
    outcome: RuleOutcome


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PassFacts:
    """What one pass cost and who shared it; the same for every row of it.

    Attributes:
        rows: rows in the batch.
        explanations: specs that shared it, over all rows.
        device: such as `cpu` or `cuda:0`.
        dtype: such as `float32`.
        plan: which plan of the program ran.
        forward_seconds: device time of the forward.
        backward_seconds: device time of all gradients.
    """

    rows: int
    explanations: int
    device: str
    dtype: str
    plan: str
    forward_seconds: float
    backward_seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The last event: what it took.

    Attributes:
        job: the request this closes.
        model_sha256: digest of weights and code, as on the card.
        facts: of the pass that carried the request.
        decode_seconds: decoding and preprocessing.
        queue_seconds: from decoded to on the device.
        map_seconds: making this request's maps on the device.
        encode_seconds: encoding them.
        total_seconds: from arrival to this event.
        rules: what became of each rule of the model.
    """

    job: Job
    model_sha256: str
    facts: PassFacts
    decode_seconds: float
    queue_seconds: float
    map_seconds: float
    encode_seconds: float
    total_seconds: float
    rules: tuple[RuleVerdict, ...] = ()


Event: TypeAlias = Prediction | Heatmap | SpecFailed | Summary

"""The vocabulary: the frozen messages that stages hand to each other, and the words they are made of.

`wire.py` makes them from protobuf and turns the last of them back; every stage between takes one and gives the next. Only numpy
appears here, so that planning, encoding and tests of them need neither torch nor grpc.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from camserve.server.errors import CamserveError

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]


class Score(enum.StrEnum):
    """Which number of a class is differentiated."""

    LOGIT = "logit"
    SOFTMAX = "softmax"


class TargetKind(enum.StrEnum):
    """How a spec says which class it asks about."""

    PREDICTED = "predicted"
    CLASS_INDEX = "class-index"
    KTH = "k-th"
    TOP_K = "top-k"


class Fusion(enum.StrEnum):
    """How the maps of several layers become one."""

    MEAN = "mean"
    MAX = "max"
    PRODUCT = "product"
    LAYERCAM = "layercam"


class Profile(enum.StrEnum):
    """Whose conventions a method follows where publications and libraries differ."""

    PAPER = "paper"
    PYTORCH_GRAD_CAM = "pytorch-grad-cam"
    TORCHCAM = "torchcam"


class Normalisation(enum.StrEnum):
    """What happens to a map's values after rectification."""

    NONE = "none"
    MIN_MAX = "min-max"


class MapSize(enum.StrEnum):
    """At which resolution a heatmap is sent."""

    LAYER = "layer"
    INPUT = "input"
    SOURCE = "source"


class Encoding(enum.StrEnum):
    """How a heatmap travels."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"
    PNG8 = "png8"
    PNG16 = "png16"
    OVERLAY_PNG = "overlay-png"
    OVERLAY_JPEG = "overlay-jpeg"
    OVERLAY_WEBP = "overlay-webp"


class Compression(enum.StrEnum):
    """Whether a payload was compressed on top of its encoding."""

    NONE = "none"
    ZLIB = "zlib"


class MapFlag(enum.StrEnum):
    """What a reader must know before trusting a map."""

    EMPTY = "empty"  # Zero everywhere after rectification.
    CONSTANT = "constant"  # One value everywhere: it points nowhere.
    NEGATIVE_ONLY = "negative-only"  # No positive evidence before rectification.
    NON_FINITE = "non-finite"  # NaN or infinity appeared and was set to zero.
    PARTIAL = "partial"  # The deadline came before the method was done.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The scalar a spec differentiates, before the prediction is known.

    Attributes:
        kind: how the class is chosen.
        value: the class index, k counted from 1 for K-TH, or the number of classes for TOP_K; unused for PREDICTED.
        score: logit or softmax probability of that class.
    """

    kind: TargetKind = TargetKind.PREDICTED
    value: int = 0
    score: Score = Score.LOGIT


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One requested explanation.

    Attributes:
        index: its place in the request.
        method: slug of a method in `cam.METHODS`.
        layers: tap names as the caller wrote them; never empty: validation has put the card's default in.
        target: what is asked about.
        profile: whose conventions to follow.
        fusion: how several layers become one map.
        rectify: keep positive evidence only; None takes what the method's paper does.
        normalisation: applied after rectification.
        size: resolution of what is sent.
        encoding: how it is sent.
        overlay_opacity: 0 to 1, weight of the map's colours in an overlay.
    """

    index: int
    method: str
    layers: tuple[str, ...]
    target: Target = Target()
    profile: Profile = Profile.PAPER
    fusion: Fusion = Fusion.MEAN
    rectify: bool | None = None
    normalisation: Normalisation = Normalisation.NONE
    size: MapSize = MapSize.LAYER
    encoding: Encoding = Encoding.UINT8
    overlay_opacity: float = 0.5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedTarget:
    """The class a map turned out to be about.

    Attributes:
        class_index: index into the model's outputs.
        score: logit or softmax.
        value: that score, as differentiated.
        rank: place among the maps of its spec, from 0.
        count: how many maps the spec gives.
    """

    class_index: int
    score: Score
    value: float
    rank: int = 0
    count: int = 1


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
        device_seconds: post-processing time of this map.
    """

    spec_index: int
    target: ResolvedTarget
    values: FloatArray
    raw_min: float
    raw_max: float
    flags: frozenset[MapFlag]
    layers: tuple[str, ...]
    device_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A JPEG, PNG, WebP, BMP or TIFF file as it arrived."""

    FIELD: ClassVar[str] = "image"
    data: bytes


class PixelFormat(enum.StrEnum):
    """Layout of a raw camera frame."""

    MONO8 = "mono8"
    MONO16 = "mono16"
    RGB8 = "rgb8"
    BGR8 = "bgr8"
    BAYER_RGGB8 = "bayer-rggb8"
    BAYER_BGGR8 = "bayer-bggr8"
    BAYER_GRBG8 = "bayer-grbg8"
    BAYER_GBRG8 = "bayer-gbrg8"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RawFrame:
    """Uncompressed pixels, rows from top to bottom.

    Attributes:
        pixel_format: how the bytes are to be read; 16-bit values are little-endian.
        width: pixels a row.
        height: rows.
        stride: bytes from one row to the next; at least a row's own bytes.
        data: `stride * (height - 1)` bytes plus one row at least.
    """

    FIELD: ClassVar[str] = "frame"
    pixel_format: PixelFormat
    width: int
    height: int
    stride: int
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """Exactly the model's input for one row; no preprocessing.

    Attributes:
        dtype: numpy name: float32, float16, uint8 …
        shape: without the batch dimension.
        data: little-endian, C order.
    """

    FIELD: ClassVar[str] = "tensor"
    dtype: str
    shape: tuple[int, ...]
    data: bytes


JobInput: TypeAlias = EncodedImage | RawFrame | TensorInput


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How model input pixels lie on the source image, both counted in pixel centres from (0, 0).

    `x_source = scale_x * x_input + offset_x`, likewise for y. EXIF orientation has been applied to the source first, so the two
    are never rotated against each other.

    Attributes:
        source_width: pixels of the source after EXIF orientation.
        source_height: likewise.
        input_width: pixels of the model's input.
        input_height: likewise.
        scale_x: source pixels for one input pixel.
        scale_y: likewise.
        offset_x: source x of the input's first column.
        offset_y: source y of the input's first row.
    """

    source_width: int
    source_height: int
    input_width: int
    input_height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One validated request.

    Attributes:
        request_id: the caller's, or ours.
        model: name in the repository.
        version: resolved, never empty.
        payload: the image, frame or tensor, still undecoded.
        specs: what to explain; empty for a prediction only.
        top_k: how many classes the prediction lists.
        labels: the caller's own strings, for the record.
        received_at: monotonic seconds.
        deadline: monotonic seconds after which nobody waits, or None.
        caller: who asked, for fairness and the access record.
    """

    request_id: str
    model: str
    version: str
    payload: JobInput
    specs: tuple[Spec, ...]
    top_k: int
    received_at: float
    deadline: float | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    caller: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A decoded input, ready to be stacked into a batch.

    Attributes:
        tensor: (c h w) or the model's own rank, float32 (or the dtype the card asks for), C-contiguous.
        geometry: how it lies on the source; None for tensors that are not images.
        source: (h w 3) uint8, kept only when a spec wants an overlay.
        decode_seconds: time in the decoder.
    """

    tensor: npt.NDArray[np.generic]
    geometry: Geometry | None
    source: ByteArray | None = None
    decode_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One line of a prediction."""

    class_index: int
    label: str
    logit: float
    probability: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the model said, best class first."""

    classes: tuple[ClassScore, ...]


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpecFailed:
    """One explanation that could not be made; the others go on."""

    spec_index: int
    error: CamserveError


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
    """

    job: Job
    model_sha256: str
    facts: PassFacts
    decode_seconds: float
    queue_seconds: float
    map_seconds: float
    encode_seconds: float
    total_seconds: float


Event: TypeAlias = Prediction | Heatmap | SpecFailed | Summary

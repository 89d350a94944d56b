"""The closed vocabularies of requests and answers: one enum for each, whose values are the words people write."""

from __future__ import annotations

import enum

__all__ = [
    "Compression",
    "Encoding",
    "Fusion",
    "Lane",
    "MapFlag",
    "MapSize",
    "Normalisation",
    "OutputKind",
    "PixelFormat",
    "Polarity",
    "Profile",
    "RuleOutcome",
    "Saliency",
    "Score",
]


class OutputKind(enum.StrEnum):
    """What a model returns, and so what can be asked about it."""

    CLASSIFICATION = "classification"
    """(b classes): one of several classes; probabilities by softmax."""
    MULTI_LABEL = "multi-label"
    """(b classes): each class by itself; probabilities by sigmoid."""
    REGRESSION = "regression"
    """(b values): numbers; nothing is a probability."""
    EMBEDDING = "embedding"
    """(b dimensions): a vector, compared by its cosine with others."""
    SEGMENTATION = "segmentation"
    """(b classes *cells): a class for every cell of a grid over the input."""
    SEQUENCE = "sequence"
    """(b steps classes): a class for every step."""
    DETECTION = "detection"
    """For each image boxes, labels and scores, as torchvision's detectors return them."""


class Score(enum.StrEnum):
    """Which number of a class is differentiated."""

    LOGIT = "logit"
    """The raw score; for regression the value itself."""
    SOFTMAX = "softmax"
    """The probability: softmax, or sigmoid for multi-label models."""
    REST = "rest"
    """ReST (arXiv:2501.06261): the logit plus the logarithm of its softmax probability."""


class Polarity(enum.StrEnum):
    """Which evidence is looked for."""

    FOR = "for"
    AGAINST = "against"
    """Grad-CAM's counterfactual (arXiv:1610.02391, section 3.3): the gradient's sign is turned."""


class Saliency(enum.StrEnum):
    """How the channels of a map in input space become what is sent."""

    COLOUR = "colour"
    """Kept apart, signed."""
    GRAY = "gray"
    """The sum of magnitudes, clipped at its 99th percentile."""
    POSITIVE = "positive"
    """The largest positive value over the channels, 0 where there is none."""
    NEGATIVE = "negative"
    """The magnitude of the most negative value over the channels, 0 where there is none."""


class Lane(enum.StrEnum):
    """How urgent a request is against others."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BULK = "bulk"


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


class RuleOutcome(enum.StrEnum):
    """What became of a rule for one request."""

    APPLIED = "applied"
    """Its explanation was made."""
    NOT_MET = "not-met"
    """Its condition does not hold for the prediction."""
    NOT_SAMPLED = "not-sampled"
    """Its sample leaves the request out; the condition was not looked at."""
    FAILED = "failed"
    """Its condition or its explanation failed."""


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

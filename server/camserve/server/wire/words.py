"""The words of the wire and ours, side by side: one table for each enum, used in both directions by the files beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from camserve.server import jobs
from camserve.server.errors import InvalidRequest, Reason
from camserve.v1 import explanation_service_pb2, heatmap_pb2, input_pb2, model_service_pb2, spec_pb2

__all__ = [
    "COMPRESSIONS",
    "DATA_TYPES",
    "ENCODINGS",
    "FLAGS",
    "FUSIONS",
    "KINDS",
    "LANES",
    "LAYOUTS",
    "METHODS",
    "NORMALISATIONS",
    "OUTPUT_KINDS",
    "PIXEL_FORMATS",
    "POLARITIES",
    "PROFILES",
    "RULE_OUTCOMES",
    "SALIENCIES",
    "SCORES",
    "SIZES",
    "inverse",
    "word",
]

_Ours = TypeVar("_Ours")


def _table(pairs: dict[int, _Ours]) -> Mapping[int, _Ours]:
    return MappingProxyType(pairs)


# Zero stands in a table only where the proto gives the unset enum a meaning; elsewhere it is refused.
METHODS = _table(
    {
        spec_pb2.METHOD_CAM: "cam",
        spec_pb2.METHOD_GRAD_CAM: "grad-cam",
        spec_pb2.METHOD_GRAD_CAM_PLUS_PLUS: "grad-cam++",
        spec_pb2.METHOD_XGRAD_CAM: "xgrad-cam",
        spec_pb2.METHOD_HIRES_CAM: "hirescam",
        spec_pb2.METHOD_LAYER_CAM: "layercam",
        spec_pb2.METHOD_EIGEN_CAM: "eigen-cam",
        spec_pb2.METHOD_GRAD_CAM_ELEMENTWISE: "grad-cam-elementwise",
        spec_pb2.METHOD_EIGEN_GRAD_CAM: "eigen-grad-cam",
        spec_pb2.METHOD_FINER_CAM: "finer-cam",
        spec_pb2.METHOD_FULL_GRAD: "fullgrad",
        spec_pb2.METHOD_RANDOM_CAM: "random-cam",
        spec_pb2.METHOD_SCORE_CAM: "score-cam",
        spec_pb2.METHOD_ABLATION_CAM: "ablation-cam",
        spec_pb2.METHOD_SMOOTH_GRAD: "smoothgrad",
        spec_pb2.METHOD_INTEGRATED_GRADIENTS: "integrated-gradients",
        spec_pb2.METHOD_OCCLUSION: "occlusion",
        spec_pb2.METHOD_VANILLA_BACKPROP: "vanilla-backprop",
        spec_pb2.METHOD_GRADIENT_TIMES_INPUT: "gradient-times-input",
        spec_pb2.METHOD_GUIDED_BACKPROP: "guided-backprop",
        spec_pb2.METHOD_DECONVNET: "deconvnet",
        spec_pb2.METHOD_GUIDED_GRAD_CAM: "guided-grad-cam",
        spec_pb2.METHOD_SMOOTH_GRAD_CAM_PLUS_PLUS: "smooth-grad-cam++",
        spec_pb2.METHOD_SHAPLEY_CAM: "shapley-cam",
        spec_pb2.METHOD_LE_GRAD: "legrad",
        spec_pb2.METHOD_ATTENTION_ROLLOUT: "attention-rollout",
        spec_pb2.METHOD_SEG_EIGEN_CAM: "seg-eigen-cam",
        spec_pb2.METHOD_KPCA_CAM: "kpca-cam",
        spec_pb2.METHOD_FEM: "fem",
        spec_pb2.METHOD_REFINE_CAM: "refine-cam",
        spec_pb2.METHOD_DEEP_FEATURE_FACTORISATION: "deep-feature-factorisation",
        spec_pb2.METHOD_SS_CAM: "ss-cam",
        spec_pb2.METHOD_IS_CAM: "is-cam",
        spec_pb2.METHOD_GROUP_CAM: "group-cam",
        spec_pb2.METHOD_RISE: "rise",
        spec_pb2.METHOD_SESS: "sess",
        spec_pb2.METHOD_SEG_XRES_CAM: "seg-xres-cam",
    }
)
PROFILES = _table(
    {
        spec_pb2.PROFILE_UNSPECIFIED: jobs.Profile.PAPER,
        spec_pb2.PROFILE_PAPER: jobs.Profile.PAPER,
        spec_pb2.PROFILE_PYTORCH_GRAD_CAM: jobs.Profile.PYTORCH_GRAD_CAM,
        spec_pb2.PROFILE_TORCHCAM: jobs.Profile.TORCHCAM,
    }
)
FUSIONS = _table(
    {
        spec_pb2.FUSION_UNSPECIFIED: jobs.Fusion.MEAN,
        spec_pb2.FUSION_MEAN: jobs.Fusion.MEAN,
        spec_pb2.FUSION_MAX: jobs.Fusion.MAX,
        spec_pb2.FUSION_PRODUCT: jobs.Fusion.PRODUCT,
        spec_pb2.FUSION_LAYER_CAM: jobs.Fusion.LAYERCAM,
    }
)
SCORES = _table(
    {
        spec_pb2.SCORE_UNSPECIFIED: jobs.Score.LOGIT,
        spec_pb2.SCORE_LOGIT: jobs.Score.LOGIT,
        spec_pb2.SCORE_SOFTMAX: jobs.Score.SOFTMAX,
        spec_pb2.SCORE_REST: jobs.Score.REST,
    }
)
POLARITIES = _table(
    {
        spec_pb2.POLARITY_UNSPECIFIED: jobs.Polarity.FOR,
        spec_pb2.POLARITY_FOR: jobs.Polarity.FOR,
        spec_pb2.POLARITY_AGAINST: jobs.Polarity.AGAINST,
    }
)
SALIENCIES = _table(
    {
        spec_pb2.SALIENCY_UNSPECIFIED: jobs.Saliency.COLOUR,
        spec_pb2.SALIENCY_COLOUR: jobs.Saliency.COLOUR,
        spec_pb2.SALIENCY_GRAY: jobs.Saliency.GRAY,
        spec_pb2.SALIENCY_POSITIVE: jobs.Saliency.POSITIVE,
        spec_pb2.SALIENCY_NEGATIVE: jobs.Saliency.NEGATIVE,
    }
)
LANES = _table(
    {
        explanation_service_pb2.LANE_UNSPECIFIED: jobs.Lane.STANDARD,
        explanation_service_pb2.LANE_INTERACTIVE: jobs.Lane.INTERACTIVE,
        explanation_service_pb2.LANE_STANDARD: jobs.Lane.STANDARD,
        explanation_service_pb2.LANE_BULK: jobs.Lane.BULK,
    }
)
SIZES = _table(
    {
        spec_pb2.MAP_SIZE_UNSPECIFIED: jobs.MapSize.LAYER,
        spec_pb2.MAP_SIZE_LAYER: jobs.MapSize.LAYER,
        spec_pb2.MAP_SIZE_INPUT: jobs.MapSize.INPUT,
        spec_pb2.MAP_SIZE_SOURCE: jobs.MapSize.SOURCE,
    }
)
ENCODINGS = _table(
    {
        spec_pb2.ENCODING_UNSPECIFIED: jobs.Encoding.UINT8,
        spec_pb2.ENCODING_FLOAT32: jobs.Encoding.FLOAT32,
        spec_pb2.ENCODING_FLOAT16: jobs.Encoding.FLOAT16,
        spec_pb2.ENCODING_UINT8: jobs.Encoding.UINT8,
        spec_pb2.ENCODING_PNG8: jobs.Encoding.PNG8,
        spec_pb2.ENCODING_PNG16: jobs.Encoding.PNG16,
        spec_pb2.ENCODING_OVERLAY_PNG: jobs.Encoding.OVERLAY_PNG,
        spec_pb2.ENCODING_OVERLAY_JPEG: jobs.Encoding.OVERLAY_JPEG,
        spec_pb2.ENCODING_OVERLAY_WEBP: jobs.Encoding.OVERLAY_WEBP,
    }
)
NORMALISATIONS = _table(
    {
        spec_pb2.NORMALISATION_UNSPECIFIED: jobs.Normalisation.NONE,
        spec_pb2.NORMALISATION_NONE: jobs.Normalisation.NONE,
        spec_pb2.NORMALISATION_MIN_MAX: jobs.Normalisation.MIN_MAX,
    }
)
PIXEL_FORMATS = _table(
    {
        input_pb2.PIXEL_FORMAT_MONO8: jobs.PixelFormat.MONO8,
        input_pb2.PIXEL_FORMAT_MONO16: jobs.PixelFormat.MONO16,
        input_pb2.PIXEL_FORMAT_RGB8: jobs.PixelFormat.RGB8,
        input_pb2.PIXEL_FORMAT_BGR8: jobs.PixelFormat.BGR8,
        input_pb2.PIXEL_FORMAT_BAYER_RGGB8: jobs.PixelFormat.BAYER_RGGB8,
        input_pb2.PIXEL_FORMAT_BAYER_BGGR8: jobs.PixelFormat.BAYER_BGGR8,
        input_pb2.PIXEL_FORMAT_BAYER_GRBG8: jobs.PixelFormat.BAYER_GRBG8,
        input_pb2.PIXEL_FORMAT_BAYER_GBRG8: jobs.PixelFormat.BAYER_GBRG8,
    }
)
DATA_TYPES = _table(
    {
        input_pb2.DATA_TYPE_FLOAT32: "float32",
        input_pb2.DATA_TYPE_FLOAT16: "float16",
        input_pb2.DATA_TYPE_FLOAT64: "float64",
        input_pb2.DATA_TYPE_UINT8: "uint8",
        input_pb2.DATA_TYPE_BFLOAT16: "bfloat16",
    }
)
COMPRESSIONS = _table(
    {
        heatmap_pb2.COMPRESSION_NONE: jobs.Compression.NONE,
        heatmap_pb2.COMPRESSION_ZLIB: jobs.Compression.ZLIB,
    }
)
FLAGS = _table(
    {
        heatmap_pb2.MAP_FLAG_EMPTY: jobs.MapFlag.EMPTY,
        heatmap_pb2.MAP_FLAG_CONSTANT: jobs.MapFlag.CONSTANT,
        heatmap_pb2.MAP_FLAG_NEGATIVE_ONLY: jobs.MapFlag.NEGATIVE_ONLY,
        heatmap_pb2.MAP_FLAG_NON_FINITE: jobs.MapFlag.NON_FINITE,
        heatmap_pb2.MAP_FLAG_PARTIAL: jobs.MapFlag.PARTIAL,
    }
)
RULE_OUTCOMES = _table(
    {
        heatmap_pb2.RULE_OUTCOME_APPLIED: jobs.RuleOutcome.APPLIED,
        heatmap_pb2.RULE_OUTCOME_NOT_MET: jobs.RuleOutcome.NOT_MET,
        heatmap_pb2.RULE_OUTCOME_NOT_SAMPLED: jobs.RuleOutcome.NOT_SAMPLED,
        heatmap_pb2.RULE_OUTCOME_FAILED: jobs.RuleOutcome.FAILED,
    }
)
KINDS = _table(
    {
        model_service_pb2.PROGRAM_KIND_TORCHSCRIPT: "torchscript",
        model_service_pb2.PROGRAM_KIND_EXPORT: "export",
        model_service_pb2.PROGRAM_KIND_EAGER: "eager",
    }
)
OUTPUT_KINDS = _table(
    {
        model_service_pb2.OUTPUT_KIND_CLASSIFICATION: jobs.OutputKind.CLASSIFICATION,
        model_service_pb2.OUTPUT_KIND_MULTI_LABEL: jobs.OutputKind.MULTI_LABEL,
        model_service_pb2.OUTPUT_KIND_REGRESSION: jobs.OutputKind.REGRESSION,
        model_service_pb2.OUTPUT_KIND_EMBEDDING: jobs.OutputKind.EMBEDDING,
        model_service_pb2.OUTPUT_KIND_SEGMENTATION: jobs.OutputKind.SEGMENTATION,
        model_service_pb2.OUTPUT_KIND_SEQUENCE: jobs.OutputKind.SEQUENCE,
        model_service_pb2.OUTPUT_KIND_DETECTION: jobs.OutputKind.DETECTION,
    }
)
LAYOUTS = _table(
    {
        model_service_pb2.LAYER_LAYOUT_UNSPECIFIED: "",
        model_service_pb2.LAYER_LAYOUT_CHANNELS_FIRST: "channels-first",
        model_service_pb2.LAYER_LAYOUT_CHANNELS_LAST: "channels-last",
        model_service_pb2.LAYER_LAYOUT_TOKENS: "tokens",
    }
)


def word(table: Mapping[int, _Ours], number: int, field: str) -> _Ours:
    """Looks an enum value up.

    Raises:
        InvalidRequest: required but unset, or a number this server does not know.
    """
    found = table.get(number)
    if found is None:
        known = ", ".join(str(value) for value in dict.fromkeys(table.values()))
        said = "is required" if number == 0 else f"has the unknown value {number}"
        raise InvalidRequest(
            Reason.FIELD_INVALID, f"{field} {said}; known are: {known}", field=field, metadata={"value": number}
        )
    return found


def inverse(table: Mapping[int, _Ours]) -> Mapping[_Ours, int]:
    """Ours to the wire's; where two numbers mean the same, the later one, which says it aloud."""
    return MappingProxyType({ours: number for number, ours in table.items()})

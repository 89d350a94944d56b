"""The light client of camserve: explain images from Python, without torch.

from camserve.client import Client, Spec

with Client("localhost:50051") as client:
    result = client.explain("part.png", model="surface", specs=["grad-cam", Spec("layercam", layers=["layer2"])])
print(result.prediction.label, result.prediction.probability)
result.heatmaps[0].save_overlay("why.png")
"""

from __future__ import annotations

from camserve.client.async_client import AsyncClient
from camserve.client.boxes import Box, Detection, HeatRegion
from camserve.client.cards import (
    ExtraInputInfo,
    InputInfo,
    LayerInfo,
    MethodInfo,
    ModelCard,
    ModelPlan,
    ModelStatus,
    RuleInfo,
)
from camserve.client.credentials import Credentials
from camserve.client.errors import (
    CamserveError,
    Cancelled,
    CorruptPayload,
    DeadlineExceeded,
    Denied,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidInput,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from camserve.client.geometry import Geometry
from camserve.client.heatmaps import Heatmap
from camserve.client.inputs import TensorInput
from camserve.client.resolved import ResolvedTarget
from camserve.client.results import ClassScore, Event, Prediction, Result, SpecError, Summary, Timings
from camserve.client.specs import Spec
from camserve.client.sync_client import Client
from camserve.client.targets import (
    Above,
    DetectionBox,
    Difference,
    Embedding,
    Kth,
    Phrase,
    Region,
    Similar,
    Steps,
    TopK,
)

__all__ = [
    "Above",
    "AsyncClient",
    "Box",
    "CamserveError",
    "Cancelled",
    "ClassScore",
    "Client",
    "CorruptPayload",
    "Credentials",
    "DeadlineExceeded",
    "Denied",
    "Detection",
    "DetectionBox",
    "Difference",
    "Embedding",
    "Event",
    "ExtraInputInfo",
    "FailedPrecondition",
    "FieldViolation",
    "Geometry",
    "HeatRegion",
    "Heatmap",
    "InputInfo",
    "Internal",
    "InvalidInput",
    "InvalidRequest",
    "Kth",
    "LayerInfo",
    "MethodInfo",
    "ModelCard",
    "ModelPlan",
    "ModelStatus",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "Phrase",
    "Prediction",
    "Region",
    "ResolvedTarget",
    "Result",
    "RuleInfo",
    "Similar",
    "Spec",
    "SpecError",
    "Steps",
    "Summary",
    "TensorInput",
    "Timings",
    "TopK",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]

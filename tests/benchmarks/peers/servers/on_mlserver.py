"""Serves the explainer on MLServer: a JPEG as one BYTES element over gRPC, the answer as another.

MLServer makes the object from `model-settings.json`, which the benchmark writes; `max_batch_size` and `max_batch_time` there turn
adaptive batching on.
"""

from __future__ import annotations

from pathlib import Path

from explainer import Explainer, decode
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class Explaining(MLModel):
    """A custom runtime."""

    async def load(self) -> bool:
        """Loads the model; in the worker, where there is one."""
        given = self.settings.parameters.extra
        self._explainer = Explainer(Path(given["weights"]), given["form"], given["threads"], given["device"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One answer for each JPEG of a merged request."""
        answers = self._explainer.explain([decode(jpeg) for jpeg in payload.inputs[0].data])
        output = ResponseOutput(name="answer", shape=[len(answers), 1], datatype="BYTES", data=answers)
        return InferenceResponse(model_name=self.name, outputs=[output])

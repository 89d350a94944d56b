"""What an explanation gives back: the events of the stream as frozen records, and all of them together as a `Result`.

The clients turn each `ExplainResponse` into one of `Prediction`, `Heatmap`, `SpecError` and `Summary` as it arrives, and
`collect` joins them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from google.protobuf import duration_pb2
from PIL import Image

from camserve.client import words
from camserve.client.boxes import Detection
from camserve.client.errors import CamserveError, Internal, from_status
from camserve.client.heatmaps import Heatmap, heatmap_from_proto
from camserve.client.inputs import PreparedInput
from camserve.v1 import explanation_service_pb2, heatmap_pb2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One class of a prediction, or one value of a regression.

    Attributes:
        class_index: index into the model's outputs.
        label: its label; empty when the model card has none.
        logit: the model's raw score; of a segmentation its mean over the cells; of a regression the value.
        probability: softmax of the logits; sigmoid for multi-label models; of a segmentation the share of the cells predicted as
            this class; 0 for a regression.
        step: which step of a sequence; None for other models.
    """

    class_index: int
    label: str
    logit: float
    probability: float
    step: int | None = None

    @property
    def name(self) -> str:
        """The label, or the class index where there is none."""
        return self.label or str(self.class_index)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the model said.

    Attributes:
        classes: the best classes, best first; of a sequence the best of each step; of a regression the values in order; none for
            an embedding or a detector.
        model: the model that answered.
        version: its version.
        detections: what a detector found, best first.
        embedding: what an embedding model returned.
    """

    classes: tuple[ClassScore, ...]
    model: str
    version: str
    detections: tuple[Detection, ...] = ()
    embedding: tuple[float, ...] = ()

    @property
    def best(self) -> ClassScore | Detection | None:
        """The best class or detection; None for an embedding, and for a detector that found nothing."""
        found: tuple[ClassScore | Detection, ...] = (*self.classes, *self.detections)
        return found[0] if found else None

    @property
    def label(self) -> str:
        """Label of the best class; empty when the model card has none, and when there is no best class."""
        return "" if self.best is None else self.best.label

    @property
    def name(self) -> str:
        """Label of the best class, or its index where there is none; empty when there is no best class."""
        return "" if self.best is None else self.best.name

    @property
    def class_index(self) -> int:
        """Index of the best class; raises ValueError when there is none."""
        return self._best().class_index

    @property
    def probability(self) -> float:
        """Probability of the best class, 0 to 1; a detector's best score; raises ValueError when there is neither."""
        best = self._best()
        return best.score if isinstance(best, Detection) else best.probability

    def _best(self) -> ClassScore | Detection:
        if self.best is None:
            told = "an embedding has no classes" if self.embedding else "nothing was detected"
            raise ValueError(f"{told}; look at `best`, which is None then")
        return self.best


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpecError:
    """A spec that could not be explained; the others are not affected.

    Attributes:
        spec_index: index of the spec in the request; of a rule's, counted on behind the request's.
        error: why, typed as a failed call would be.
        rule: name of the model's rule that asked for it; empty for a spec of the request.
    """

    spec_index: int
    error: CamserveError
    rule: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the server's time went, in seconds; forward and backward are shared by all rows of the pass."""

    decode: float
    queue: float
    forward: float
    backward: float
    maps: float
    encode: float
    total: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the explanation took.

    Attributes:
        request_id: the request's id, for the server's log.
        model: the model that answered.
        version: its version.
        model_sha256: digest over weights and code, hexadecimal.
        timings: where the time went.
        batch_rows: rows that shared the pass.
        pass_explanations: specs that shared the pass, over all its rows.
        plan: which plan of the program ran: "forward", "tapped" or "compiled".
        device: such as "cpu" or "cuda:0".
        dtype: such as "float32".
        rules: what became of each rule of the model by its name: "applied", "not-met", "not-sampled" or "failed".
    """

    request_id: str
    model: str
    version: str
    model_sha256: str
    timings: Timings
    batch_rows: int
    pass_explanations: int
    plan: str
    device: str
    dtype: str
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)


Event: TypeAlias = Prediction | Heatmap | SpecError | Summary


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """One image, explained.

    Attributes:
        prediction: what the model said.
        heatmaps: the maps, in order of their specs and then of their targets.
        errors: the specs that could not be explained.
        summary: what it took.
        source: name of the input: its path, or such as "bytes".
    """

    prediction: Prediction
    heatmaps: tuple[Heatmap, ...]
    errors: tuple[SpecError, ...]
    summary: Summary
    source: str
    _input: PreparedInput = dataclasses.field(repr=False)

    def picture(self) -> Image.Image | None:
        """Returns the source as it was sent, EXIF orientation applied; None for a tensor."""
        return None if self._input.picture is None else self._input.picture()

    def raise_for_errors(self) -> None:
        """Raises the error of the first spec of the request that could not be explained, if any; rules are the server's."""
        for spec_error in self.errors:
            if not spec_error.rule:
                raise spec_error.error


def event_from_proto(response: explanation_service_pb2.ExplainResponse, source: PreparedInput | None) -> Event | None:
    """Returns the event a response carries; None for a kind newer than this client."""
    match response.WhichOneof("event"):
        case "prediction":
            return _prediction(response.prediction)
        case "heatmap":
            return heatmap_from_proto(response.heatmap, source)
        case "spec_error":
            failed = response.spec_error
            return SpecError(spec_index=failed.spec_index, error=from_status(failed.status), rule=failed.rule)
        case "summary":
            return _summary(response.summary)
    return None


def collect(events: Iterable[Event], source: PreparedInput) -> Result:
    """Joins the events of one finished stream.

    Raises:
        Internal: when the stream lacks its prediction or its summary: it was cut off without an error.
    """
    events = list(events)
    predictions = [event for event in events if isinstance(event, Prediction)]
    summaries = [event for event in events if isinstance(event, Summary)]
    if not predictions or not summaries:
        raise Internal(
            "INTERNAL", "STREAM_INCOMPLETE", "the stream ended before its prediction and summary had arrived"
        )
    heatmaps = [event for event in events if isinstance(event, Heatmap)]
    errors = [event for event in events if isinstance(event, SpecError)]
    return Result(
        prediction=predictions[0],
        heatmaps=tuple(sorted(heatmaps, key=lambda heatmap: (heatmap.spec_index, heatmap.target_index))),
        errors=tuple(sorted(errors, key=lambda spec_error: spec_error.spec_index)),
        summary=summaries[0],
        source=source.name,
        _input=source,
    )


def _prediction(message: heatmap_pb2.Prediction) -> Prediction:
    classes = tuple(
        ClassScore(
            class_index=item.class_index,
            label=item.label,
            logit=item.logit,
            probability=item.probability,
            step=item.step if item.HasField("step") else None,
        )
        for item in message.classes
    )
    return Prediction(
        classes=classes,
        model=message.model,
        version=message.version,
        detections=tuple(Detection.from_proto(item) for item in message.detections),
        embedding=tuple(message.embedding),
    )


def _summary(message: heatmap_pb2.Summary) -> Summary:
    return Summary(
        request_id=message.request_id,
        model=message.model,
        version=message.version,
        model_sha256=message.model_sha256,
        timings=Timings(
            **{field.name: seconds(getattr(message.timings, field.name)) for field in dataclasses.fields(Timings)}
        ),
        batch_rows=message.batch_rows,
        pass_explanations=message.pass_explanations,
        plan=message.plan,
        device=message.device,
        dtype=message.dtype,
        rules={verdict.rule: words.RULE_OUTCOMES.word(verdict.outcome) for verdict in message.rules},
    )


def seconds(duration: duration_pb2.Duration) -> float:
    """Returns a duration in seconds."""
    return duration.seconds + duration.nanos / 1e9

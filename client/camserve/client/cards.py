"""Which models a server has and what can be asked of them, as frozen records.

`Client.models()` gives a `ModelStatus` for each, `Client.model(name)` the `ModelCard` of one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from camserve.client import words
from camserve.client.results import seconds
from camserve.v1 import model_service_pb2, spec_pb2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """How one version of a model fares.

    Attributes:
        name: its name.
        version: its version.
        state: "loading", "ready", "failed", "unloading" or "unloaded".
        error: why it failed, or why a ready one could not be loaded anew from files that have changed; else empty.
        class_count: number of classes, when ready.
        default_layer: the layer explained when a spec names none, when ready.
        version_labels: names that requests may give in place of this version, such as "stable".
    """

    name: str
    version: str
    state: str
    error: str
    class_count: int
    default_layer: str
    version_labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """A place that can be tapped.

    Attributes:
        name: what to put into `Spec.layers`.
        shape: of its value for one row, as the model lays it out.
        layout: "channels-first", "channels-last" or "tokens"; empty when its maps cannot be read.
        map_shape: sizes of a map made there: height and width.
        refusal: why no map can be made there; empty when one can.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    map_shape: tuple[int, ...]
    refusal: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MethodInfo:
    """Whether a method works on the model.

    Attributes:
        method: such as "grad-cam".
        works: whether it does.
        note: why not, or at which layers only.
    """

    method: str
    works: bool
    note: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputInfo:
    """How images become the model's input.

    Attributes:
        shape: of one row, such as (3, 224, 224).
        resize: "stretch", "crop", "letterbox" or "none".
        mean: subtracted from each channel after scaling to 0 to 1.
        std: divides each channel then.
        channels: "rgb", "bgr" or "gray".
    """

    shape: tuple[int, ...]
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """How a model is run, as its server chose by trial when it loaded it.

    Attributes:
        form: such as "folded, channels last, fused up to layer4", or "as loaded"; empty when the server does not say.
        speedup: of a forward over the program as loaded.
        deviation: largest difference of an output from the program as loaded, relative to the largest output.
        threads: of one operation on a CPU; 0 for the library's own number.
        chunk_rows: inputs that an amplified method tries before other requests get their turn.
    """

    form: str
    speedup: float
    deviation: float
    threads: int
    chunk_rows: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtraInputInfo:
    """An input that a request must send besides the first.

    Attributes:
        name: what to call it in `extra_inputs`.
        shape: of one row.
        dtype: such as "float32".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuleInfo:
    """A rule by which the server explains without being asked.

    Attributes:
        name: as heatmaps, spec errors and summaries carry it.
        when: a CEL expression over the prediction and the request; empty when it always holds.
        sample: share of the requests it is applied to, 0 to 1; it takes those whose id `takes`.
        asks: fields of the `camserve.v1.Spec` that it asks for, as protobuf's JSON has them.
    """

    name: str
    when: str
    sample: float
    asks: Mapping[str, Any]

    @property
    def spec(self) -> spec_pb2.Spec:
        """What it asks for: among the specs of a request it gives the same map."""
        return json_format.ParseDict(dict(self.asks), spec_pb2.Spec())

    def takes(self, request_id: str) -> bool:
        """Whether its sample holds a request, whatever the prediction: anybody can work it out again from the id."""
        digest = hashlib.sha256(f"{self.name}\n{request_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.sample * 2.0**64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known about a loaded model.

    Attributes:
        name: its name.
        version: its version.
        labels: class labels by index; empty when unknown.
        class_count: number of classes.
        input: how images become its input.
        kind: the file it came from: "torchscript", "export" or "eager".
        device: such as "cpu" or "cuda:0".
        dtype: such as "float32".
        layers: every tap, in order of execution.
        default_layer: the layer explained when a spec names none.
        methods: what can be asked of it.
        weights_sha256: digest over parameters and buffers, hexadecimal.
        code_sha256: digest over code or graph.
        model_sha256: digest over both, as summaries carry it.
        max_batch_rows: most rows in one pass.
        static_batch_rows: the only batch size it takes; None when it takes any.
        rows_independent: whether rows of one batch were seen not to influence each other.
        warm_up_seconds: what warming up took.
        notes: what to know about it, such as "random weights".
        output_kind: what it returns: "classification", "multi-label", "regression", "embedding", "segmentation", "sequence" or
            "detection"; empty when the server does not say.
        stages: the last layer of each resolution that gives a map, shallowest first.
        phrases: those that a `Phrase` may ask about.
        extra_inputs: what a request must send besides the first input.
        plan: how it is run.
        rules: when it is explained without anybody asking.
        memory_bytes: of parameters and buffers, in every form that is held.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    class_count: int
    input: InputInfo
    kind: str
    device: str
    dtype: str
    layers: tuple[LayerInfo, ...]
    default_layer: str
    methods: tuple[MethodInfo, ...]
    weights_sha256: str
    code_sha256: str
    model_sha256: str
    max_batch_rows: int
    static_batch_rows: int | None
    rows_independent: bool
    warm_up_seconds: float
    notes: tuple[str, ...]
    output_kind: str
    stages: tuple[str, ...]
    phrases: tuple[str, ...]
    extra_inputs: tuple[ExtraInputInfo, ...]
    plan: ModelPlan
    rules: tuple[RuleInfo, ...] = ()
    memory_bytes: int = 0


def status_from_proto(message: model_service_pb2.ModelStatus) -> ModelStatus:
    """Returns the status a message holds."""
    return ModelStatus(
        name=message.name,
        version=message.version,
        state=words.MODEL_STATES.word(message.state),
        error=message.error,
        class_count=message.class_count,
        default_layer=message.default_layer,
        version_labels=tuple(message.version_labels),
    )


def card_from_proto(message: model_service_pb2.ModelCard) -> ModelCard:
    """Returns the card a message holds."""
    return ModelCard(
        name=message.name,
        version=message.version,
        labels=tuple(message.labels),
        class_count=message.class_count,
        input=InputInfo(
            shape=tuple(message.input.shape),
            resize=message.input.resize,
            mean=tuple(message.input.mean),
            std=tuple(message.input.std),
            channels=message.input.channels,
        ),
        kind=words.PROGRAM_KINDS.word(message.kind),
        device=message.device,
        dtype=message.dtype,
        layers=tuple(
            LayerInfo(
                name=layer.name,
                shape=tuple(layer.shape),
                layout=words.LAYOUTS.word(layer.layout),
                map_shape=tuple(layer.map_shape),
                refusal=layer.refusal,
            )
            for layer in message.layers
        ),
        default_layer=message.default_layer,
        methods=tuple(
            MethodInfo(method=words.METHODS.word(method.method), works=method.works, note=method.note)
            for method in message.methods
        ),
        weights_sha256=message.weights_sha256,
        code_sha256=message.code_sha256,
        model_sha256=message.model_sha256,
        max_batch_rows=message.max_batch_rows,
        static_batch_rows=message.static_batch_rows if message.HasField("static_batch_rows") else None,
        rows_independent=message.rows_independent,
        warm_up_seconds=seconds(message.warm_up),
        notes=tuple(message.notes),
        memory_bytes=message.memory_bytes,
        output_kind=words.OUTPUT_KINDS.word(message.output_kind),
        stages=tuple(message.stages),
        phrases=tuple(message.phrases),
        extra_inputs=tuple(
            ExtraInputInfo(name=extra.name, shape=tuple(extra.shape), dtype=extra.dtype)
            for extra in message.extra_inputs
        ),
        plan=ModelPlan(
            form=message.plan.form,
            speedup=message.plan.speedup,
            deviation=message.plan.deviation,
            threads=message.plan.threads,
            chunk_rows=message.plan.chunk_rows,
        ),
        rules=tuple(
            RuleInfo(
                name=rule.name,
                when=rule.when,
                sample=rule.sample,
                asks=json_format.MessageToDict(rule.spec, preserving_proto_field_name=True),
            )
            for rule in message.rules
        ),
    )

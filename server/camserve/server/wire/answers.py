"""Events and errors to the messages callers get; called by `service.py` and `interceptors.py` on the event loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from camserve.server import errors, jobs
from camserve.server.models.card import ModelCard
from camserve.server.wire import words
from camserve.server.wire.tables import spec_message
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import heatmap_pb2, input_pb2, model_service_pb2

__all__ = ["DOMAIN", "card_message", "response", "status_of"]

DOMAIN = "camserve"
# Far below a pixel, far above what rounding leaves.
_HAIR = 1e-4

# The stubs want their own enum types where the run time takes any number; Any stands between.
_METHODS: Mapping[str, Any] = words.inverse(words.METHODS)
_PROFILES: Mapping[jobs.Profile, Any] = words.inverse(words.PROFILES)
_SCORES: Mapping[jobs.Score, Any] = words.inverse(words.SCORES)
_POLARITIES: Mapping[jobs.Polarity, Any] = words.inverse(words.POLARITIES)
_OUTPUT_KINDS: Mapping[jobs.OutputKind, Any] = words.inverse(words.OUTPUT_KINDS)
_ENCODINGS: Mapping[jobs.Encoding, Any] = words.inverse(words.ENCODINGS)
_COMPRESSIONS: Mapping[jobs.Compression, Any] = words.inverse(words.COMPRESSIONS)
_FLAGS: Mapping[jobs.MapFlag, Any] = words.inverse(words.FLAGS)
_RULE_OUTCOMES: Mapping[jobs.RuleOutcome, Any] = words.inverse(words.RULE_OUTCOMES)
_KINDS: Mapping[str, Any] = words.inverse(words.KINDS)
_LAYOUTS: Mapping[str, Any] = words.inverse(words.LAYOUTS)

# By reason rather than by class: errors.proto promises a status for each reason, whichever room raises it.
_CODES: Mapping[errors.Reason, Any] = MappingProxyType(
    {
        errors.Reason.FIELD_INVALID: code_pb2.INVALID_ARGUMENT,
        errors.Reason.IMAGE_UNDECODABLE: code_pb2.INVALID_ARGUMENT,
        errors.Reason.IMAGE_TOO_LARGE: code_pb2.INVALID_ARGUMENT,
        errors.Reason.TENSOR_MISMATCH: code_pb2.INVALID_ARGUMENT,
        errors.Reason.INPUT_NOT_FINITE: code_pb2.INVALID_ARGUMENT,
        errors.Reason.TOO_MANY_SPECS: code_pb2.INVALID_ARGUMENT,
        errors.Reason.MODEL_NOT_FOUND: code_pb2.NOT_FOUND,
        errors.Reason.VERSION_NOT_FOUND: code_pb2.NOT_FOUND,
        errors.Reason.LAYER_NOT_FOUND: code_pb2.NOT_FOUND,
        errors.Reason.LABEL_NOT_FOUND: code_pb2.NOT_FOUND,
        errors.Reason.LAYER_UNUSABLE: code_pb2.FAILED_PRECONDITION,
        errors.Reason.CLASS_OUT_OF_RANGE: code_pb2.INVALID_ARGUMENT,
        errors.Reason.METHOD_NOT_IMPLEMENTED: code_pb2.UNIMPLEMENTED,
        errors.Reason.FEATURE_NOT_IMPLEMENTED: code_pb2.UNIMPLEMENTED,
        errors.Reason.METHOD_UNSUPPORTED_BY_MODEL: code_pb2.FAILED_PRECONDITION,
        errors.Reason.TARGET_NOT_DIFFERENTIABLE: code_pb2.FAILED_PRECONDITION,
        errors.Reason.QUEUE_FULL: code_pb2.RESOURCE_EXHAUSTED,
        errors.Reason.DRAINING: code_pb2.UNAVAILABLE,
        errors.Reason.MODEL_NOT_READY: code_pb2.UNAVAILABLE,
        errors.Reason.DEADLINE_EXCEEDED: code_pb2.DEADLINE_EXCEEDED,
        errors.Reason.OUT_OF_MEMORY: code_pb2.RESOURCE_EXHAUSTED,
        errors.Reason.MODEL_FAILED: code_pb2.INTERNAL,
        errors.Reason.INTERNAL: code_pb2.INTERNAL,
        errors.Reason.DEADLINE_UNREACHABLE: code_pb2.RESOURCE_EXHAUSTED,
        errors.Reason.MODEL_UNLOADED: code_pb2.NOT_FOUND,
        errors.Reason.MODEL_LOAD_FAILED: code_pb2.FAILED_PRECONDITION,
        errors.Reason.REPOSITORY_MISSING: code_pb2.FAILED_PRECONDITION,
        errors.Reason.RULE_FAILED: code_pb2.INTERNAL,
        errors.Reason.MODEL_MEMORY_EXHAUSTED: code_pb2.RESOURCE_EXHAUSTED,
        errors.Reason.RATE_LIMITED: code_pb2.RESOURCE_EXHAUSTED,
        errors.Reason.TOO_MANY_CONCURRENT: code_pb2.RESOURCE_EXHAUSTED,
        errors.Reason.CREDENTIALS_MISSING: code_pb2.UNAUTHENTICATED,
        errors.Reason.CREDENTIALS_INVALID: code_pb2.UNAUTHENTICATED,
        errors.Reason.CREDENTIALS_EXPIRED: code_pb2.UNAUTHENTICATED,
        errors.Reason.CREDENTIALS_NOT_YET_VALID: code_pb2.UNAUTHENTICATED,
        errors.Reason.ROLE_MISSING: code_pb2.PERMISSION_DENIED,
    }
)


def response(event: jobs.Event, card: ModelCard) -> service_pb2.ExplainResponse:
    """One event as the stream carries it."""
    match event:
        case jobs.Prediction():
            return service_pb2.ExplainResponse(prediction=_prediction(event, card))
        case jobs.Heatmap():
            return service_pb2.ExplainResponse(heatmap=_heatmap(event))
        case jobs.SpecFailed():
            error = service_pb2.SpecError(spec_index=event.spec_index, status=status_of(event.error), rule=event.rule)
            return service_pb2.ExplainResponse(spec_error=error)
        case jobs.Summary():
            return service_pb2.ExplainResponse(summary=_summary(event))


def status_of(error: errors.CamserveError) -> status_pb2.Status:
    """A google.rpc.Status with exactly one ErrorInfo, and BadRequest, RetryInfo or ResourceInfo where they help."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata))
    details: list[object] = [info]
    code = _CODES[error.reason]
    if code == code_pb2.INVALID_ARGUMENT and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    elif error.field:
        # BadRequest belongs to INVALID_ARGUMENT; the path still helps whoever asked for something unbuilt or missing.
        info.metadata["field"] = error.field
    if error.retry_after_seconds is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after_seconds)))
    if code == code_pb2.NOT_FOUND:
        kind = error.reason.partition("_")[0].lower()
        name = error.metadata.get(kind, "")
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=f"camserve.v1.{kind}", resource_name=name, description=error.message
            )
        )
    status = status_pb2.Status(code=code, message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)  # type: ignore[arg-type]  # every entry above is a message
        status.details.append(packed)
    return status


def card_message(card: ModelCard) -> model_service_pb2.ModelCard:
    """A card as `GetModel` returns it."""
    recipe = card.recipe
    return model_service_pb2.ModelCard(
        name=card.name,
        version=card.version,
        labels=card.labels,
        class_count=card.class_count,
        input=model_service_pb2.InputInfo(
            shape=recipe.shape, resize=recipe.resize, mean=recipe.mean, std=recipe.std, channels=recipe.channels
        ),
        kind=_KINDS[card.kind],
        device=card.device,
        dtype=card.dtype,
        layers=[
            model_service_pb2.LayerInfo(
                name=layer.name,
                shape=layer.shape,
                layout=_LAYOUTS[layer.layout],
                map_shape=layer.map_shape,
                refusal=layer.refusal,
            )
            for layer in card.layers
        ],
        default_layer=card.default_layer,
        methods=[
            model_service_pb2.MethodInfo(method=_METHODS[method.slug], works=method.works, note=method.note)
            for method in card.methods
        ],
        weights_sha256=card.weights_sha256,
        code_sha256=card.code_sha256,
        model_sha256=card.model_sha256,
        max_batch_rows=card.max_batch_rows,
        static_batch_rows=card.static_batch_rows,
        rows_independent=card.rows_independent,
        warm_up=_duration(card.warm_up_seconds),
        notes=card.notes,
        memory_bytes=card.memory_bytes,
        output_kind=_OUTPUT_KINDS[card.output_kind],
        stages=card.stages,
        phrases=card.phrases,
        extra_inputs=[
            model_service_pb2.ExtraInputInfo(name=extra.name, shape=extra.shape, dtype=extra.dtype)
            for extra in card.extra_inputs
        ],
        plan=model_service_pb2.ModelPlan(
            form=card.plan.form,
            speedup=card.plan.speedup,
            deviation=card.plan.deviation,
            threads=card.plan.threads,
            chunk_rows=card.plan.chunk_rows,
        ),
        rules=[
            model_service_pb2.RuleInfo(
                name=rule.name, when=rule.when, sample=rule.sample, spec=spec_message(rule.asks, f"rules[{rule.name}]")
            )
            for rule in card.rules
        ],
    )


def _prediction(prediction: jobs.Prediction, card: ModelCard) -> heatmap_pb2.Prediction:
    return heatmap_pb2.Prediction(
        classes=[
            heatmap_pb2.ClassScore(
                class_index=entry.class_index,
                label=entry.label,
                logit=entry.logit,
                probability=entry.probability,
                step=entry.step,
            )
            for entry in prediction.classes
        ],
        model=card.name,
        version=card.version,
        detections=[
            _detection(found.box, found.class_index, found.label, found.score) for found in prediction.detections
        ],
        embedding=prediction.embedding,
    )


def _detection(box: jobs.Box, class_index: int, label: str, score: float) -> heatmap_pb2.Detection:
    return heatmap_pb2.Detection(box=_outwards(box), class_index=class_index, label=label, score=score)


def _outwards(box: jobs.Box) -> input_pb2.Box:
    """The smallest box of whole pixels around a box; a hair that arithmetic left beyond an edge does not count."""
    left, top = math.floor(box.left + _HAIR), math.floor(box.top + _HAIR)
    return input_pb2.Box(
        left_pixels=left,
        top_pixels=top,
        width_pixels=math.ceil(box.left + box.width - _HAIR) - left,
        height_pixels=math.ceil(box.top + box.height - _HAIR) - top,
    )


def _target(target: jobs.ResolvedTarget, label: str) -> heatmap_pb2.ResolvedTarget:
    message = heatmap_pb2.ResolvedTarget(
        class_index=target.class_index,
        label=label,
        score=_SCORES[target.score],
        value=target.value,
        polarity=_POLARITIES[target.polarity],
        other_class_index=target.other_class_index,
        step=target.step,
        cells=target.cells,
        iou=target.iou,
        concept=target.concept,
        phrase=target.phrase,
    )
    if target.box is not None:
        message.detection.CopyFrom(_detection(target.box, target.class_index or 0, label, target.value))
    return message


def _heatmap(heatmap: jobs.Heatmap) -> heatmap_pb2.Heatmap:
    raw = heatmap.raw
    message = heatmap_pb2.Heatmap(
        spec_index=raw.spec_index,
        target_index=raw.target.rank,
        target_count=raw.target.count,
        target=_target(raw.target, heatmap.label),
        method=_METHODS[heatmap.method],
        profile=_PROFILES[heatmap.profile],
        layers=raw.layers,
        shape=heatmap.shape,
        axes=heatmap.axes,
        encoding=_ENCODINGS[heatmap.encoding],
        compression=_COMPRESSIONS[heatmap.compression],
        payload=heatmap.payload,
        value_min=heatmap.value_min,
        value_max=heatmap.value_max,
        raw_min=raw.raw_min,
        raw_max=raw.raw_max,
        flags=sorted(_FLAGS[flag] for flag in raw.flags),
        raw_sha256=heatmap.raw_sha256,
        payload_sha256=heatmap.payload_sha256,
        regions=[
            heatmap_pb2.HeatRegion(box=_outwards(region.box), peak=region.peak, share=region.share)
            for region in heatmap.regions
        ],
        completed=raw.completed,
        rule=heatmap.rule,
    )
    geometry = heatmap.geometry
    if geometry is not None:
        message.geometry.CopyFrom(
            heatmap_pb2.Geometry(
                scale_x=geometry.scale_x,
                offset_x=geometry.offset_x,
                scale_y=geometry.scale_y,
                offset_y=geometry.offset_y,
                source_width_pixels=geometry.source_width,
                source_height_pixels=geometry.source_height,
            )
        )
    return message


def _summary(summary: jobs.Summary) -> heatmap_pb2.Summary:
    facts = summary.facts
    return heatmap_pb2.Summary(
        request_id=summary.job.request_id,
        model=summary.job.model,
        version=summary.job.version,
        model_sha256=summary.model_sha256,
        timings=heatmap_pb2.Timings(
            decode=_duration(summary.decode_seconds),
            queue=_duration(summary.queue_seconds),
            forward=_duration(facts.forward_seconds),
            backward=_duration(facts.backward_seconds),
            maps=_duration(summary.map_seconds),
            encode=_duration(summary.encode_seconds),
            total=_duration(summary.total_seconds),
        ),
        batch_rows=facts.rows,
        pass_explanations=facts.explanations,
        plan=facts.plan,
        device=facts.device,
        dtype=facts.dtype,
        rules=[
            heatmap_pb2.RuleVerdict(rule=verdict.rule, outcome=_RULE_OUTCOMES[verdict.outcome])
            for verdict in summary.rules
        ],
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    nanoseconds = max(0, round(seconds * 1e9))
    return duration_pb2.Duration(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)

"""What was inferred so far in the terms of the protocol, read off the instruments of the metrics page; they know both fronts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from prometheus_client.metrics import MetricWrapperBase

from camserve.server.metrics import Metrics
from camserve.server.models.card import ModelCard
from camserve.server.oip.messages import ModelStatisticsResponse

__all__ = ["statistics"]

_NANOSECONDS: Final = 1e9


def statistics(cards: Iterable[ModelCard], metrics: Metrics) -> Any:
    """A ModelStatisticsResponse.

    Args:
        cards: of the versions that answer and are asked about.
        metrics: of the server.
    """
    response = ModelStatisticsResponse()
    for card in cards:
        told = response.model_stats.add(name=card.name, version=card.version)
        passes, rows = _histogram(metrics.batch_rows, card)
        told.inference_count, told.execution_count = round(rows), round(passes)
        stats = told.inference_stats
        answered, request_seconds = _histogram(metrics.request_seconds, card)
        _, decode_seconds = _histogram(metrics.decode_seconds, card)
        _, device_seconds = _histogram(metrics.pass_seconds, card)
        _put(stats.success, answered, request_seconds)
        _put(stats.fail, _failed(metrics, card), 0.0)
        _put(stats.queue, *_histogram(metrics.queue_seconds, card))
        # Counted alike, since perf_analyzer ends where they differ; so each is a mean for one row.
        _put(stats.compute_input, answered, decode_seconds)
        _put(stats.compute_infer, answered, device_seconds)
        _put(stats.compute_output, answered, 0.0)
        device, _, number = card.device.partition(":")
        told.memory_usage.add(
            type="CPU" if device == "cpu" else "GPU", id=int(number or 0), byte_size=card.memory_bytes
        )
    return response


def _put(duration: Any, count: float, seconds: float) -> None:
    duration.count, duration.ns = round(count), round(seconds * _NANOSECONDS)


def _histogram(instrument: MetricWrapperBase, card: ModelCard) -> tuple[float, float]:
    """How often something was observed of a version, and the sum of what was."""
    return _sum(instrument, card, "_count"), _sum(instrument, card, "_sum")


def _failed(metrics: Metrics, card: ModelCard) -> float:
    return _sum(metrics.requests, card, "_total") - _sum(metrics.requests, card, "_total", code="OK")


def _sum(instrument: MetricWrapperBase, card: ModelCard, suffix: str, **labels: str) -> float:
    wanted = {"model": card.name, "version": card.version, **labels}.items()
    return sum(
        sample.value
        for family in instrument.collect()
        for sample in family.samples
        if sample.name.endswith(suffix) and wanted <= sample.labels.items()
    )

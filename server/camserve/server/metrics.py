"""Every instrument camserve exports, declared once, with units and buckets.

`app.py` makes one `Metrics` for a server; the pipeline, the door, the dispatcher and the access record write to it, and
`pages.py` shows its registry. Layers are never a label: their number has no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from camserve.server.logs import lost_lines

__all__ = ["Metrics"]

# Seconds. Fine below 100 ms, where a production line decides, and up to a minute, where amplified methods live.
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The instruments of one server, in a registry of their own so that several servers fit into one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_LogFailures())
        self.build = Info("camserve_build", "Version of camserve and of torch.", registry=registry)
        self.requests = Counter(
            "camserve_requests_total",
            "Finished requests by gRPC status code: Explain, ModelInfer, and each one of a ModelStreamInfer.",
            ["model", "version", "code"],
            registry=registry,
        )
        self.explanations = Counter(
            "camserve_explanations_total",
            "Finished explanations (specs) by method; outcome is ok or the error's reason.",
            ["model", "method", "outcome"],
            registry=registry,
        )
        self.rules = Counter(
            "camserve_rules_total",
            "Rules looked at, one for each answered request; outcome is applied, not-met, not-sampled or failed.",
            ["model", "rule", "outcome"],
            registry=registry,
        )
        self.rejected = Counter(
            "camserve_rejected_total",
            "Requests refused before any decoding: at the door, or for what one caller may take.",
            ["reason"],
            registry=registry,
        )
        self.refused_callers = Counter(
            "camserve_refused_callers_total",
            "Calls refused for who makes them, by the error's reason.",
            ["reason"],
            registry=registry,
        )
        self.stale_credentials = Gauge(
            "camserve_stale_credentials",
            "1 while files of this setting are broken and what they said before stays, else 0.",
            ["setting"],
            registry=registry,
        )
        self.cancelled = Counter(
            "camserve_cancelled_total",
            "Requests whose caller left or whose deadline passed, by the stage they were in.",
            ["stage"],
            registry=registry,
        )
        self.in_flight = Gauge("camserve_requests_in_flight", "Requests past the door.", registry=registry)
        self.queue_depth = Gauge(
            "camserve_queue_depth", "Decoded requests waiting for the device.", ["lane"], registry=registry
        )
        self.queued_seconds = Gauge(
            "camserve_queued_device_seconds",
            "Predicted device time of what is past the door and has not run, as far as it is known.",
            ["lane"],
            registry=registry,
        )
        self.queue_bytes = Gauge("camserve_queue_bytes", "Bytes held for requests past the door.", registry=registry)
        self.oldest_wait = Gauge(
            "camserve_oldest_wait_seconds",
            "Age of the oldest request that waits for the device.",
            ["lane"],
            registry=registry,
        )
        self.request_seconds = self._latency(
            "camserve_request_seconds", "From arrival of a request to its last message.", ["model", "version"]
        )
        self.first_message_seconds = self._latency(
            "camserve_first_message_seconds", "From arrival of a request to its prediction.", ["model"]
        )
        self.decode_seconds = self._latency(
            "camserve_decode_seconds", "Decoding and preprocessing of one input.", ["model", "version"]
        )
        self.queue_seconds = self._latency(
            "camserve_queue_seconds", "From decoded to on the device, one request.", ["model", "version"]
        )
        self.pass_seconds = self._latency(
            "camserve_pass_seconds",
            "Device time of one shared pass by phase: forward, backward, maps; and of each chunk of amplified work.",
            ["model", "version", "phase"],
        )
        self.encode_seconds = self._latency("camserve_encode_seconds", "Encoding of one heatmap.", ["encoding"])
        self.batch_rows = Histogram(
            "camserve_batch_rows",
            "Rows in one pass; its count is the number of passes, its sum the rows run.",
            ["model", "version"],
            buckets=COUNT_BUCKETS,
            registry=registry,
        )
        self.explanations_per_pass = Histogram(
            "camserve_explanations_per_pass",
            "Explanations (specs) that shared one pass.",
            ["model"],
            buckets=COUNT_BUCKETS,
            registry=registry,
        )
        self.batch_cut = Counter(
            "camserve_batch_cut_total",
            "Passes by why they had no more rows: rows, slice, deadline, depth, share, window or idle.",
            ["reason"],
            registry=registry,
        )
        self.device_seconds = Counter(
            "camserve_device_seconds_total",
            "Device time of passes, by the lanes of their rows, and of chunks of amplified work.",
            ["lane"],
            registry=registry,
        )
        self.device_busy = Counter(
            "camserve_device_busy_seconds_total",
            "Time in which the device thread ran a pass or a chunk.",
            registry=registry,
        )
        self.device_piece_seconds = Gauge(
            "camserve_device_piece_seconds",
            "Age of what the device thread is at: a pass, a chunk or a call; 0 while it is idle.",
            registry=registry,
        )
        self.stalled = Gauge(
            "camserve_stalled", "1 while a thread hangs: device or loop.", ["thread"], registry=registry
        )
        self.hooks = Gauge(
            "camserve_hooks",
            "Hooks on the modules of served models; above 0 only while a pass runs.",
            registry=registry,
        )
        self.model_ready = Gauge(
            "camserve_model_ready", "1 for a model version that answers.", ["model", "version"], registry=registry
        )
        self.draining = Gauge("camserve_draining", "1 while the server is shutting down.", registry=registry)

    def _latency(self, name: str, documentation: str, labels: list[str]) -> Histogram:
        return Histogram(name, documentation, labels, buckets=LATENCY_BUCKETS, registry=self.registry)

    def watch_queue(
        self,
        lane: str,
        depth: Callable[[], float],
        queued_seconds: Callable[[], float],
        oldest: Callable[[], float],
    ) -> None:
        """Lets the gauges of a lane read the queue when they are scraped, so that they are never stale."""
        self.queue_depth.labels(lane).set_function(depth)
        self.queued_seconds.labels(lane).set_function(queued_seconds)
        self.oldest_wait.labels(lane).set_function(oldest)

    def forget_version(self, model: str, version: str) -> None:
        """A version is not in memory any more: its series end."""
        for instrument in (
            self.requests,
            self.request_seconds,
            self.decode_seconds,
            self.queue_seconds,
            self.pass_seconds,
            self.batch_rows,
            self.model_ready,
        ):
            instrument.remove_by_labels({"model": model, "version": version})

    def forget_model(self, model: str) -> None:
        """No version of a model is: label values would pile up for as long as the server runs."""
        for instrument in (
            self.requests,
            self.explanations,
            self.rules,
            self.request_seconds,
            self.first_message_seconds,
            self.decode_seconds,
            self.queue_seconds,
            self.pass_seconds,
            self.batch_rows,
            self.explanations_per_pass,
            self.model_ready,
        ):
            instrument.remove_by_labels({"model": model})


class _LogFailures(Collector):
    """Logs belong to the process, not to one server; read when it is scraped."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        """One counter."""
        yield CounterMetricFamily(
            "camserve_log_failures", "Log lines that could not be written.", value=float(lost_lines())
        )

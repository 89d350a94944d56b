"""The only place where objects are built, joined, started and drained.

`cli.py` and tests make an `App` from settings and model sources; the rest of camserve gets what it needs as arguments.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import time
from collections.abc import Sequence
from importlib.metadata import version

import grpc
import structlog
import torch
from grpc_reflection.v1alpha import reflection

from camserve.server.announcements import Announcements
from camserve.server.callers.health_names import check_health_name
from camserve.server.callers.reloaded import follow
from camserve.server.callers.turnstile import Turnstile
from camserve.server.connections import connection_options
from camserve.server.credentials import credentials_of
from camserve.server.decode import DecodeLimits
from camserve.server.dispatch import dispatch
from camserve.server.door import Door, DoorLimits
from camserve.server.engine.turns import InTurn
from camserve.server.health import SERVICES, Health
from camserve.server.heartbeat import Heartbeat
from camserve.server.interceptors import CallInterceptor
from camserve.server.jobs import Lane
from camserve.server.listening import open_port
from camserve.server.loading import load_served, request_limits
from camserve.server.metrics import Metrics
from camserve.server.models.budget import Budget
from camserve.server.models.compiling_queue import CompilingQueue
from camserve.server.models.lifecycle import Lifecycle
from camserve.server.models.repository import Repository, ServedModel
from camserve.server.models.sources import ModelSource
from camserve.server.oip import registration
from camserve.server.oip.inference import Inference
from camserve.server.oip.servicer import InferenceServicer
from camserve.server.oip.streams import Streams
from camserve.server.pages import Pages
from camserve.server.pipeline import Pipeline
from camserve.server.queue import DeviceQueue
from camserve.server.reception import Reception
from camserve.server.runner import Runner
from camserve.server.service import ExplanationServicer, ModelServicer
from camserve.server.settings import Settings
from camserve.server.tracing import tracer_of
from camserve.server.watchdog import Watchdog
from camserve.v1 import explanation_service_pb2_grpc, model_service_pb2_grpc

__all__ = ["App", "resolve_device"]

_log = structlog.get_logger("camserve.app")
# A caller who was just answered has come back by then, if at all.
_QUIET_SECONDS = 0.25
_LONGEST_QUIET_SECONDS = 2.0


def resolve_device(name: str) -> torch.device:
    """`auto` becomes CUDA when there is a device, else CPU.

    Raises:
        ValueError: CUDA was asked for by name and there is none.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch sees no CUDA device; use device=cpu or auto")
    return device


class App:
    """One server. `start`, then `load`, then `drain`; all on one event loop."""

    def __init__(self, settings: Settings, sources: Sequence[ModelSource]) -> None:
        self.settings = settings
        self._credentials = credentials_of(settings)
        self.metrics = Metrics()
        self.repository = Repository(sources)
        self.device = resolve_device(settings.device)
        self.port = 0
        self.metrics_port = 0
        self._sources = list(sources)
        self._health = Health(check_health_name)
        self._heartbeat = Heartbeat()
        self._tracer = tracer_of(os.environ)
        self._runner = Runner(self.metrics, settings.torch_threads, self._heartbeat, self._tracer)
        self._workers = concurrent.futures.ThreadPoolExecutor(settings.decoders, thread_name_prefix="camserve-worker")
        self.turnstile = Turnstile(self._credentials.limits_of, self.metrics)
        self._closing = contextlib.AsyncExitStack()
        self._is_draining = False
        self._watching: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self.broken = asyncio.Event()

    async def start(self) -> None:
        """Opens the ports. Explain answers UNAVAILABLE until `load` has loaded the model it names."""
        settings, metrics = self.settings, self.metrics
        metrics.build.info({"version": version("camserve"), "torch": torch.__version__})
        queue = DeviceQueue(settings.planner_limits)
        limits = DoorLimits(
            max_requests=settings.max_requests,
            max_held_bytes=settings.max_held_bytes,
            max_queued_seconds=settings.max_queued_seconds,
        )
        self._door = Door(limits, metrics, queue.forecast)
        metrics.hooks.set_function(self.repository.hooks)
        self._compiling = CompilingQueue(self.repository, cache=settings.plan_cache, on_device=self._runner.call)
        self.lifecycle = Lifecycle(
            self.repository,
            self._sources,
            root=settings.repository,
            load=self._load_model,
            on_device=self._runner.call,
            witness=Announcements(
                repository=self.repository,
                health=self._health,
                metrics=metrics,
                queue=queue,
                compiling=self._compiling,
            ),
            budget=Budget(max_bytes=settings.max_model_bytes, may_unload=settings.unload_idle_models),
        )
        metrics.queue_bytes.set_function(lambda: self._door.held_bytes)
        for lane in Lane:
            metrics.watch_queue(
                lane,
                functools.partial(queue.depth, lane),
                functools.partial(queue.queued_seconds, lane),
                functools.partial(queue.oldest_wait, lane, time.monotonic),
            )
        pipeline = Pipeline(
            door=self._door,
            queue=queue,
            workers=self._workers,
            decode_limits=DecodeLimits(max_pixels=settings.max_image_pixels, max_bytes=settings.max_request_bytes),
            metrics=metrics,
        )
        server = grpc.aio.server(
            interceptors=[
                CallInterceptor(
                    metrics,
                    self.turnstile,
                    Reception(settings.messages_at_once, settings.receive_seconds, metrics),
                    guard=self._credentials.guard,
                    write_seconds=settings.write_seconds,
                    tracer=self._tracer,
                )
            ],
            options=connection_options(settings),
        )
        explanation_service_pb2_grpc.add_ExplanationServiceServicer_to_server(
            ExplanationServicer(self.repository, pipeline, request_limits(settings)), server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(self.repository, self.lifecycle), server
        )
        inference = Inference(
            self.repository, pipeline, request_limits(settings), workers=self._workers, turnstile=self.turnstile
        )
        streams = Streams(inference, self.turnstile, metrics, self._tracer)
        registration.add_to(
            server,
            InferenceServicer(
                self.repository, self.lifecycle, inference, streams, health=self._health, metrics=metrics
            ),
        )
        self._health.add_to(server)
        reflection.enable_server_reflection(
            (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME), server, registration.BothPools()
        )
        await self._health.set_server(is_serving=False)
        self.port = open_port(server, settings.listen, self._credentials.tls)
        watchdog = Watchdog(
            self._heartbeat,
            loop=asyncio.get_running_loop(),
            stall_seconds=settings.stall_seconds,
            metrics=metrics,
            on_change=self._health.set_stall,
        )
        self._closing.callback(watchdog.close)
        if settings.metrics_listen:
            pages = Pages(
                settings.metrics_listen,
                metrics.registry,
                liveness=lambda: watchdog.stall,
                readiness=lambda: self._health.why_not_ready() or watchdog.stall,
            )
            self.metrics_port = pages.port
            self._closing.callback(pages.close)
        await server.start()
        self._server = server
        if self._credentials.files:
            following = follow(self._credentials.files, metrics)
            self._following = asyncio.create_task(following, name="camserve-credentials")
        self._dispatching = asyncio.create_task(dispatch(queue, self._runner), name="camserve-dispatch")
        self._dispatching.add_done_callback(self._when_dispatch_ends)

    async def load(self) -> None:
        """Loads every model, one after another, while those that are ready serve; one that fails leaves the others alone."""
        await self.lifecycle.start()
        if self._is_draining:
            return
        await self._health.set_server(is_serving=True)
        self._compiling.begin()
        if self.settings.watch_repository and self.settings.repository is not None:
            # Imported here: most servers do not watch, and start without what that needs.
            from camserve.server.models.watching import watch  # noqa: PLC0415

            watching = watch(self.settings.repository, self.lifecycle.follow)
            self._watching = asyncio.create_task(watching, name="camserve-watch")

    async def compiled(self) -> None:
        """Waits, after `load`, until the plan of every model that asks for it is compiled or given up; requests never do."""
        await self._compiling.wait()

    def _load_model(self, source: ModelSource, in_turn: InTurn) -> ServedModel:
        """Loads one model, in the thread of the lifecycle."""
        return load_served(source, self.settings, self.device, in_turn)

    async def drain(self) -> bool:
        """Shuts down so that nobody who was let in is lost; a second call does nothing.

        Not ready first, then a pause in which balancers notice, then the door closes, accepted requests finish within
        `drain_seconds`, their callers are refused if they come again, and the rest is cancelled. A model that is still loading
        is not waited for.

        Returns:
            Whether everything ended; if not, a thread is still busy and only ending the process will stop it.
        """
        if self._is_draining:
            return True
        self._is_draining = True
        self.metrics.draining.set(1)
        inside, knocks = self._door.inside, self._door.knocks
        _log.info("draining", requests=inside)
        await self._health.drain()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        await self.lifecycle.close()
        await self._compiling.close()
        # Time itself is what is waited for: no balancer tells when it has noticed.
        await asyncio.sleep(self.settings.drain_delay_seconds)
        self._door.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._door.wait_until_empty(), self.settings.drain_seconds)
            if inside or self._door.knocks > knocks:
                # gRPC cancels, without a word, calls that come while it stops: callers in the habit of coming are refused before.
                await self._door.wait_until_quiet(_QUIET_SECONDS, most_seconds=_LONGEST_QUIET_SECONDS)
        # Answers on their way out get a moment; whoever is still inside now is cancelled.
        await self._server.stop(grace=1.0)
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        self._dispatching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._dispatching
        is_idle = await self._runner.close(self.settings.drain_seconds) and self.lifecycle.is_idle
        self._workers.shutdown(wait=is_idle, cancel_futures=True)
        await self._closing.aclose()
        await asyncio.to_thread(self._tracer.close)
        _log.info("stopped", is_idle=is_idle)
        return is_idle

    def _when_dispatch_ends(self, task: asyncio.Task[None]) -> None:
        """Without the dispatcher no request is answered: whoever runs the server must end it."""
        if not self._is_draining:
            _log.error("dispatch stopped: this is a bug", exc_info=None if task.cancelled() else task.exception())
            self.broken.set()

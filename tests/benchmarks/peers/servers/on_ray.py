"""Serves the explainer on Ray Serve with `@serve.batch`: a JPEG as the body of a POST, the answer as bytes.

One replica. `max_ongoing_requests` is raised beyond its default of 5, which would keep batches from filling; JPEG files are
decoded when they arrive, while the batch waits, as Ray's guide does with requests. No log line a request: no other server here
writes any.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray
from explainer import Explainer, decode
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--form", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--window", type=float, required=True)
    given = parser.parse_args()

    @serve.deployment(
        max_ongoing_requests=64,
        logging_config={"enable_access_log": False},
        ray_actor_options={"num_cpus": given.threads, "num_gpus": 1 if given.device == "cuda" else 0},
    )
    class Explaining:
        """The replica."""

        def __init__(self) -> None:
            self._explainer = Explainer(given.weights, given.form, given.threads, given.device)

        @serve.batch(max_batch_size=given.max_batch, batch_wait_timeout_s=given.window)
        async def explain(self, rows: list[Tensor]) -> list[bytes]:
            """One answer a row."""
            return self._explainer.explain(rows)

        async def __call__(self, request: Request) -> Response:
            """Answers one request."""
            row = decode(await request.body())
            return Response(content=await self.explain(row), media_type="application/octet-stream")

    ray.init(num_cpus=given.threads, num_gpus=1 if given.device == "cuda" else 0, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port}, logging_config={"enable_access_log": False})
    # Blocks until a signal, and takes everything down then.
    serve.run(Explaining.bind(), blocking=True)

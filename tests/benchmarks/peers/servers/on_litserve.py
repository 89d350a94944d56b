"""Serves the explainer on LitServe: a JPEG as a multipart upload, the answer as bytes.

One worker process and one API process, as `ls.LitServer` starts them; `batch_timeout` closes a batch that has not filled.

LitServe compares annotations with classes, so they must not be strings: no `from __future__ import annotations` here.
"""

import argparse
from pathlib import Path

import litserve as ls
from explainer import Explainer, decode
from fastapi import Request, Response
from torch import Tensor


class Explaining(ls.LitAPI):
    """`decode_request` runs once a request and `predict` once a batch, in the worker."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(max_batch_size=arguments.max_batch, batch_timeout=arguments.window)
        self._arguments = arguments

    def setup(self, device: str) -> None:
        """Loads the model in the worker."""
        given = self._arguments
        self._explainer = Explainer(given.weights, given.form, given.threads, device)

    def decode_request(self, request: Request) -> Tensor:
        """The upload as the model's input."""
        return decode(request["image"].file.read())

    def batch(self, inputs: list[Tensor]) -> list[Tensor]:
        """The explainer stacks them."""
        return inputs

    def predict(self, inputs: list[Tensor]) -> list[bytes]:
        """One answer a row."""
        return self._explainer.explain(inputs)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """Already one answer a row."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """Bytes: maps as JSON numbers would cost more."""
        return Response(content=output, media_type="application/octet-stream")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--form", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--window", type=float, required=True)
    arguments = parser.parse_args()
    # timeout=False: by default requests that waited 30 seconds are given up.
    server = ls.LitServer(Explaining(arguments), accelerator=arguments.device, devices=1, timeout=False)
    server.run(host="127.0.0.1", port=arguments.port, generate_client_file=False, log_level="warning")

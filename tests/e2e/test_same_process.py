"""Clients of other servers beside ours and our server in one process, where protobuf knows each message's name once.

Two packages that each bring generated code for package `inference` cannot be imported together (kserve/kserve#3099). A process of
its own for each order of imports: what is once imported stays.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.standard_clients import packages

# The test's environment, and behind it what only the other client's has.
TOGETHER = """
import importlib, json, sys

folder, *modules = sys.argv[1:]
sys.path.append(folder)
for module in modules:
    importlib.import_module(module)

import numpy as np
from camserve.client import Client, Spec, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.models.sources import demo_sources
from camserve.server.settings import Settings

row = np.random.default_rng(7).normal(size=(1, 3, 160, 160)).astype(np.float32)
settings = Settings(listen="127.0.0.1:0", metrics_listen="", drain_delay_seconds=0, log_level="error")
with BackgroundServer(settings, demo_sources()) as server, Client(server.target) as client:
    found = client.explain(TensorInput(row[0]), model="surface", specs=[Spec("grad-cam", encoding="float32")])
    ours = found.heatmaps[0].values
    theirs = asked(server.target)
print(json.dumps({"shape": ours.shape, "same": ours.tobytes() == theirs.tobytes()}))
"""
BY_TRITON = """
def asked(target):
    import tritonclient.grpc as triton

    tensor = triton.InferInput("input", row.shape, "FP32")
    tensor.set_data_from_numpy(row)
    with triton.InferenceServerClient(target) as client:
        answer = client.infer("surface", [tensor], outputs=[triton.InferRequestedOutput("heatmap")])
    return answer.as_numpy("heatmap")
"""
BY_KSERVE = """
def asked(target):
    import asyncio
    from kserve import InferenceGRPCClient, InferInput, InferRequest
    from kserve.protocol.infer_type import RequestedOutput

    async def infer():
        tensor = InferInput("input", list(row.shape), "FP32")
        tensor.set_data_from_numpy(row)
        request = InferRequest("surface", [tensor], request_outputs=[RequestedOutput("heatmap")])
        async with InferenceGRPCClient(target) as client:
            return await client.infer(request)

    return asyncio.run(infer()).outputs[0].as_numpy()
"""
OURS = ("camserve.client", "camserve.server.app")
BOTH = {"shape": [20, 20], "same": True}


def together(client: str, asked: str, *modules: str) -> dict[str, object]:
    """Imports these in this order into a new process, has a server there explain a row for both clients, and tells what came."""
    done = subprocess.run(  # noqa: S603 - the text above
        [sys.executable, "-c", asked + TOGETHER, str(packages(client)), *modules],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert 0 == done.returncode, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.needs_tritonclient
@pytest.mark.parametrize("first", [True, False], ids=["ours-first", "theirs-first"])
def test_triton_client_beside_ours(first):
    """Triton's client may be imported before or after camserve's client and server, and all of them work together."""
    theirs = ("tritonclient.grpc", "tritonclient.grpc.aio")

    assert BOTH == together("tritonclient", BY_TRITON, *((*OURS, *theirs) if first else (*theirs, *OURS)))


@pytest.mark.needs_kserve
@pytest.mark.parametrize("first", [True, False], ids=["ours-first", "theirs-first"])
def test_kserve_client_beside_ours(first):
    """KServe's client may be imported before or after camserve's client and server, and all of them work together."""
    assert BOTH == together("kserve", BY_KSERVE, *((*OURS, "kserve") if first else ("kserve", *OURS)))

"""Clients of other servers beside ours and our server in one process, where protobuf knows each message's name once.

Two packages that each bring generated code for package `inference` cannot be imported together (kserve/kserve#3099). A process of
its own for each order of imports, as what is once imported stays; both are forked from one that has torch, which takes longest.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.standard_clients import packages

# The test's environment, and behind it what only the other client's has.
TOGETHER = """
import importlib, json, os, sys
import numpy as np
import torch

folder, *orders = sys.argv[1:]
sys.path.append(folder)
row = np.random.default_rng(7).normal(size=(1, 3, 160, 160)).astype(np.float32)

def explained():
    from camserve.client import Client, Spec, TensorInput
    from camserve.server.background import BackgroundServer
    from camserve.server.models.sources import demo_sources
    from camserve.server.settings import Settings

    settings = Settings(listen="127.0.0.1:0", metrics_listen="", drain_delay_seconds=0, log_level="error")
    with BackgroundServer(settings, demo_sources()) as server, Client(server.target) as client:
        found = client.explain(TensorInput(row[0]), model="surface", specs=[Spec("grad-cam", encoding="float32")])
        ours = found.heatmaps[0].values
        theirs = asked(server.target)
    return {"shape": ours.shape, "same": ours.tobytes() == theirs.tobytes()}

for order in orders:
    child = os.fork()
    if not child:
        for module in order.split(","):
            importlib.import_module(module)
        print(json.dumps(explained()), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {order}")
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
OURS = "camserve.client,camserve.server.app"
BOTH = {"shape": [20, 20], "same": True}


def together(client: str, asked: str, *orders: str) -> list[object]:
    """Imports these in each order into a process, has a server there explain a row for both clients, and tells what came."""
    done = subprocess.run(  # noqa: S603 - the text above
        [sys.executable, "-c", asked + TOGETHER, str(packages(client)), *orders],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert 0 == done.returncode, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.needs_tritonclient
def test_triton_client_beside_ours():
    """Triton's client may be imported before or after camserve's client and server, and all of them work together."""
    theirs = "tritonclient.grpc,tritonclient.grpc.aio"

    assert [BOTH, BOTH] == together("tritonclient", BY_TRITON, f"{OURS},{theirs}", f"{theirs},{OURS}")


@pytest.mark.needs_kserve
def test_kserve_client_beside_ours():
    """KServe's client may be imported before or after camserve's client and server, and all of them work together."""
    assert [BOTH, BOTH] == together("kserve", BY_KSERVE, f"{OURS},kserve", f"kserve,{OURS}")

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

from camserve.client import Client
from camserve.server.background import BackgroundServer
from camserve.server.models.sources import demo_sources
from camserve.server.settings import Settings
import numpy as np

settings = Settings(listen="127.0.0.1:0", metrics_listen="", drain_delay_seconds=0, log_level="error")
with BackgroundServer(settings, demo_sources()) as server, Client(server.target) as client:
    ours = client.explain(np.full((160, 160, 3), 90, np.uint8), model="surface", specs=["grad-cam"])
    print(json.dumps({"ours": ours.heatmaps[0].values.shape}))
"""
OURS = ("camserve.client", "camserve.server.app")


def together(client: str, *modules: str) -> dict[str, object]:
    """Imports these in this order into a new process, explains an image there, and tells what came back."""
    done = subprocess.run(  # noqa: S603 - the text above
        [sys.executable, "-c", TOGETHER, str(packages(client)), *modules],
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
    """Triton's client may be imported before or after camserve's client and server, and all of them work."""
    theirs = ("tritonclient.grpc", "tritonclient.grpc.aio")

    assert {"ours": [20, 20]} == together("tritonclient", *((*OURS, *theirs) if first else (*theirs, *OURS)))


@pytest.mark.needs_kserve
@pytest.mark.parametrize("first", [True, False], ids=["ours-first", "theirs-first"])
def test_kserve_client_beside_ours(first):
    """KServe's client may be imported before or after camserve's client and server, and all of them work."""
    assert {"ours": [20, 20]} == together("kserve", *((*OURS, "kserve") if first else ("kserve", *OURS)))

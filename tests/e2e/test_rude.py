"""Rude models, readers and requests: the server answers, goes on and can be stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.nets import TinyNet
from support.patience import under_a_deadline
from support.rude import rude_source
from support.servers import Metrics, script_source, settings, until

from camserve.client import Client, DeadlineExceeded, Event, Internal, InvalidRequest, Spec, TensorInput
from camserve.server.background import BackgroundServer
from camserve.v1 import explanation_service_pb2, explanation_service_pb2_grpc, input_pb2, spec_pb2

CAMSERVE = str(Path(sys.executable).with_name("camserve"))
DARK = TensorInput(np.zeros((3, 32, 32), np.float32))
BRIGHT = TensorInput(np.full((3, 32, 32), 3, np.float32))


@pytest.mark.parametrize("name", ["raises_exit", "raises_interrupt", "raises_generator", "raises_cancelled"])
def test_model_that_raises_what_nobody_catches(serve, name):
    """SystemExit and its like from a model fail that row; the device thread and the next request live."""
    server = serve(rude_source(name))
    model = name.replace("_", "-")
    with Client(server.target, retries=0) as client:
        with pytest.raises(Internal) as caught:
            client.explain(BRIGHT, model=model, timeout=120)
        assert "MODEL_FAILED" == caught.value.reason
        assert client.explain(DARK, model=model, specs=["grad-cam"]).heatmaps


@pytest.mark.parametrize("name", ["load_exit", "load_stop", "load_cancelled"])
def test_model_that_fails_to_load_leaves_the_others(tmp_path, name):
    """Whatever a factory raises, the load ends, the slot says why, and the models after it serve."""
    server = BackgroundServer(settings(), [rude_source(name), script_source("tiny", TinyNet(), tmp_path)])

    with pytest.raises(ValueError, match="could not be loaded"):
        server.__enter__()

    slots = {slot.name: slot for slot in server.app.repository.slots()}
    assert ("failed", "ready") == (slots[name.replace("_", "-")].state.value, slots["tiny"].state.value)


def test_reader_that_stops_reading_loses_its_place(serve, tmp_path):
    """A caller that reads one message and no more is cut off soon after its own deadline, and its place is free again."""
    server = serve(script_source("tiny", TinyNet(), tmp_path), max_requests=1)
    metrics = Metrics(server)
    image = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    # Nine megabytes each, which do not compress: more than the buffers on the way can hold.
    specs = [Spec("grad-cam", encoding="float32", size="source", rectify=False, target=index % 4) for index in range(8)]
    with Client(server.target, retries=0, timeout=120) as client:

        def begun(seconds: float) -> Iterator[Event]:
            events = client.stream(image, model="tiny", specs=specs, deadline=seconds)
            next(events)
            return events

        events = under_a_deadline(begun)
        asyncio.run(until(lambda: metrics.value("camserve_requests_in_flight") == 0))
        assert client.explain(DARK, model="tiny").prediction
        with pytest.raises(DeadlineExceeded):
            list(events)


def test_too_many_specs_are_refused_before_they_are_read(demo_server):
    """Two hundred thousand specs are counted, not parsed: the answer comes at once."""
    request = explanation_service_pb2.ExplainRequest(
        model="surface", image=input_pb2.EncodedImage(data=b"x"), specs=[spec_pb2.Spec(method=2)] * 200_000
    )
    with grpc.insecure_channel(demo_server.target) as channel:
        stub = explanation_service_pb2_grpc.ExplanationServiceStub(channel)
        # Of this process, which the server is in: whatever else the machine does meanwhile.
        started = time.process_time()
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Explain(request))

    assert grpc.StatusCode.INVALID_ARGUMENT == caught.value.code()
    assert time.process_time() - started < 5.0


def test_one_layer_under_two_names(client, samples):
    """`layer2` and `layer2#0` are one layer and may be named once."""
    with pytest.raises(InvalidRequest, match="name each layer once"):
        client.explain(samples[0], model="surface", specs=[Spec("layercam", layers=["layer2", "layer2#0"])])


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_stop_while_a_model_loads_for_ever(tmp_path, numbers):
    """SIGTERM does not wait for a load; a second signal of either kind ends the process at once."""
    folder = tmp_path / "models" / "slow"
    folder.mkdir(parents=True)
    (folder / "1").mkdir()
    (folder / "model.toml").write_text(
        '[factory]\nname = "support.rude:load_for_ever"\nallowed_imports = ["support.rude"]\nrandom_seed = 0\n',
        encoding="utf-8",
    )
    flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "", "--drain-delay-seconds", "0"]
    paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(  # noqa: S603 - our own command
        [CAMSERVE, "serve", "--models", str(tmp_path / "models"), *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process, process.stderr as lines:
        assert any("loading for ever" in line for line in lines)
        for number in numbers:
            process.send_signal(number)
        status = process.wait(timeout=120)

    assert status in ({0} if len(numbers) == 1 else {0, 128 + signal.SIGINT, 128 + signal.SIGTERM})

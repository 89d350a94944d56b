"""Lanes, costs and deadlines as callers meet them."""

from __future__ import annotations

import numpy as np
import pytest
from support.nets import TinyNet
from support.patience import under_a_deadline
from support.servers import Metrics, script_source

from camserve.client import Client, Overloaded, Spec, TensorInput

ROW = TensorInput(np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32))
LONG = {"samples": 300, "seed": 1}


@pytest.fixture
def server(serve, tmp_path):
    """A small network, served."""
    return serve(script_source("tiny", TinyNet(), tmp_path))


def test_a_deadline_that_cannot_be_met_is_refused_at_once(server):
    """Once it is known what a method takes, a quarter of that is too little, and the caller is told so; partial maps are not."""
    with Client(server.target, retries=0, timeout=120) as client:
        took = min(
            client.explain(ROW, model="tiny", specs=[spec]).summary.timings.maps
            for spec in [Spec("ss-cam", **LONG)] * 5
        )
        with pytest.raises(Overloaded, match="even alone") as caught:
            client.explain(ROW, model="tiny", specs=[Spec("ss-cam", **LONG)], deadline=took / 4)
        partial = under_a_deadline(
            lambda seconds: client.explain(
                ROW, model="tiny", specs=[Spec("ss-cam", allow_partial=True, **LONG)], deadline=max(seconds, took / 2)
            ),
            lambda result: bool(result.heatmaps),
        )

    assert "DEADLINE_UNREACHABLE" == caught.value.reason
    assert caught.value.retry_after is None
    assert 1 == len(partial.heatmaps)
    assert 1 == Metrics(server).value("camserve_rejected_total", reason="DEADLINE_UNREACHABLE")


def test_device_time_is_told_by_lane(server):
    """Each lane's requests are counted on it, and nothing is left queued."""
    metrics = Metrics(server)
    with Client(server.target) as client:
        for lane in ("interactive", "bulk", "bulk"):
            client.explain(ROW, model="tiny", specs=["grad-cam"], lane=lane)

    assert 0 < metrics.value("camserve_device_seconds_total", lane="interactive")
    assert 0 < metrics.value("camserve_device_seconds_total", lane="bulk")
    assert 0 == metrics.value("camserve_device_seconds_total", lane="standard")
    assert 3 == metrics.value("camserve_batch_cut_total")
    assert 0 == metrics.value("camserve_queued_device_seconds")

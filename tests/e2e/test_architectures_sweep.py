"""A map at every stage of a network in one request: they share a pass, and are what single requests give."""

from __future__ import annotations

import numpy as np
import pytest
from support.architectures import eager
from support.servers import Metrics

from camserve.client import Client, Spec
from camserve.server.models.config import InputConfig, OutputConfig

INPUT = InputConfig(size=(32, 48), mean=(0.0,), std=(1.0,))


@pytest.mark.parametrize(
    ("factory", "kind"), [("unet", "segmentation"), ("pictures", "classification"), ("detector", "detection")]
)
def test_a_sweep_is_one_pass(serve, factory, kind):
    """One row in one pass with all stages; the same bits as alone, in a fraction of the passes."""
    size = InputConfig(size=(64, 96), mean=(0.0,), std=(1.0,)) if kind == "detection" else INPUT
    server = serve(eager("net", factory, size, output=OutputConfig(kind=kind)))
    picture = np.random.default_rng(0).integers(0, 255, (*size.size, 3)).astype(np.uint8)
    methods = ("grad-cam", "layercam", "hirescam", "eigen-cam")
    with Client(server.target) as client:
        stages = client.model("net").stages
        specs = [Spec(slug, layers=[stage], encoding="float32") for stage in stages for slug in methods]
        before = Metrics(server).value("camserve_batch_rows_count", model="net")

        together = client.explain(picture, model="net", specs=specs)
        after = Metrics(server).value("camserve_batch_rows_count", model="net")
        alone = [client.explain(picture, model="net", specs=[spec]) for spec in specs]

    together.raise_for_errors()
    assert len(stages) > 1
    assert (1, len(specs)) == (together.summary.batch_rows, together.summary.pass_explanations)
    assert 1 == after - before
    assert [result.heatmaps[0].raw_sha256 for result in alone] == [item.raw_sha256 for item in together.heatmaps]
    sizes = [item.values.size for item in together.heatmaps[:: len(methods)]]
    assert len(stages) == len(set(sizes))

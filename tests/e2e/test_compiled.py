"""A model that asks for it is compiled beside the serving, and at the next start served compiled at once."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections.abc import Iterator

import numpy as np
import pytest
from support.nets import TinyNet
from support.servers import script_source, settings

from camserve.client import Client, Spec, TensorInput
from camserve.server.background import BackgroundServer
from camserve.server.models.config import PlanConfig, RuleConfig
from camserve.server.models.sources import ModelSource

pytestmark = [
    pytest.mark.needs_compiler,
    pytest.mark.timeout(1800),
]  # Compiling takes minutes where others want the cores.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where archives and packages lie."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def source(folder):
    """A tiny net that asks to be compiled for passes of one row."""
    return script_source(
        "tiny",
        TinyNet(),
        folder,
        labels=("a", "b", "c", "d"),
        default_layer="body",
        plan=PlanConfig(compile=True, batch_sizes=(1,)),
    )


def explained(server, specs):
    """What the server says of one input."""
    row = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
    with Client(server.target, timeout=180) as client:
        return client.explain(TensorInput(row), model="tiny", specs=specs)


SPECS = [Spec("grad-cam", encoding="float32", target="b"), Spec("layercam", encoding="float32", target=1)]


def test_requests_ride_the_compiled_plan_and_get_the_same_maps(source, folder):
    """Before it is ready the ordinary plan answers; afterwards the compiled one, alike; other layers still go the ordinary way.

    The next start finds the package and compiles nothing: its file stays as it was written.
    """
    start = settings(max_batch_rows=2, plan_cache=folder / "plans")
    with BackgroundServer(start, [source]) as server:
        before = explained(server, SPECS)
        server.run(server.app.compiled()).result()
        after = explained(server, SPECS)
        other = explained(server, [Spec("grad-cam", layers=["stem"])])
        with Client(server.target, timeout=180) as client:
            (note,) = (note for note in client.model("tiny").notes if "compiled" in note)
    (package,) = (folder / "plans").iterdir()
    written_at = package.stat().st_mtime_ns

    assert ["tapped", "compiled", "tapped"] == [result.summary.plan for result in (before, after, other)]
    assert note.startswith("compiled at body for rows: 1 (")
    for one, same in zip(before.prediction.classes, after.prediction.classes, strict=True):
        assert (one.class_index, one.label) == (same.class_index, same.label)
        assert one.logit == pytest.approx(same.logit, rel=1e-4, abs=1e-6)
    for one, same in zip(before.heatmaps, after.heatmaps, strict=True):
        assert one.target.class_index == same.target.class_index == 1
        np.testing.assert_allclose(one.values, same.values, rtol=1e-3, atol=1e-5 * one.values.max())

    with BackgroundServer(start, [source]) as server:
        server.run(server.app.compiled()).result()
        again = explained(server, SPECS)
    assert [package] == list((folder / "plans").iterdir())
    assert written_at == package.stat().st_mtime_ns
    assert "compiled" == again.summary.plan
    assert [one.raw_sha256 for one in after.heatmaps] == [one.raw_sha256 for one in again.heatmaps]


def ruled(source: ModelSource, *rules: RuleConfig) -> ModelSource:
    """The same model, explained by rules: the same package serves it."""
    return dataclasses.replace(source, config=source.config.model_copy(update={"explain": rules}))


def test_what_rules_ask_for_rides_the_compiled_plan_as_well(source, folder):
    """A request for a prediction, explained by a rule, runs on the graph, and its map has the bits of the same spec asked for.

    One whose rule wants another layer goes the ordinary way, with the same map but for rounding.
    """
    start = settings(max_batch_rows=2, plan_cache=folder / "plans")
    why = RuleConfig(name="why", method="grad-cam", encoding="float32")
    early = RuleConfig(name="early", method="grad-cam", layers=["stem"], encoding="float32")
    with BackgroundServer(start, [ruled(source, why)]) as server:
        before = explained(server, [])
        server.run(server.app.compiled()).result()
        after, asked = explained(server, []), explained(server, [Spec("grad-cam", encoding="float32")])
    with BackgroundServer(start, [ruled(source, why, early)]) as server:
        server.run(server.app.compiled()).result()
        both = explained(server, [])

    results = (after, asked, both)
    assert ["compiled", "compiled", "tapped"] == [result.summary.plan for result in results]
    assert [["why"], ["", "why"], ["why", "early"]] == [[one.rule for one in result.heatmaps] for result in results]
    assert {"applied"} == {outcome for result in (before, *results) for outcome in result.summary.rules.values()}
    (compiled,) = after.heatmaps
    assert {compiled.raw_sha256} == {one.raw_sha256 for one in asked.heatmaps}
    for ordinary in (before.heatmaps[0], both.heatmaps[0]):
        np.testing.assert_allclose(ordinary.values, compiled.values, rtol=1e-3, atol=1e-5 * compiled.values.max())


@contextlib.contextmanager
def files_up_to(most_bytes: int) -> Iterator[None]:
    """As on a disk that fills up: no process started here writes a larger file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_for_the_plan(source, tmp_path):
    """Where the package cannot be written the ordinary plan goes on, the card says why, and nothing half-written is left."""
    start = settings(max_batch_rows=2, plan_cache=tmp_path / "plans")
    with BackgroundServer(start, [source]) as server:
        with files_up_to(20_000):
            server.run(server.app.compiled()).result()
        result = explained(server, SPECS)
        with Client(server.target, timeout=180) as client:
            (note,) = (note for note in client.model("tiny").notes if "compiled" in note)

    assert note.startswith("not compiled for rows 1, the ordinary plan serves: ")
    assert [] == list((tmp_path / "plans").iterdir())
    assert ("tapped", 2) == (result.summary.plan, len(result.heatmaps))

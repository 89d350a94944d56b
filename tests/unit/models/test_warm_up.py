"""A model large enough that its plan is worth choosing: which form serves, what passes cost, how large chunks are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torchvision

from camserve.server.engine.effort import effort_of
from camserve.server.engine.passes import Amplification, Mapped, run_pass
from camserve.server.engine.planned import FUSED, ORIGINAL, REWRITTEN
from camserve.server.jobs import Parameters, RawMap, Spec
from camserve.server.models.config import InputConfig, ModelConfig
from camserve.server.models.loader import load_model
from camserve.server.models.sources import ModelSource

SIZE = 160
ROWS = 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A scripted ResNet-18 with seeded random weights and statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.resnet18(weights=None).eval()
        for child in net.modules():
            if isinstance(child, torch.nn.BatchNorm2d):
                child.running_mean.normal_(0, 0.1)
                child.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("resnet18") / "model.pt"
    torch.jit.save(torch.jit.script(net), str(path))
    return path


def loaded(archive, **options):
    """It, on a CPU."""
    source = ModelSource(
        name="net", version="1", path=archive, config=ModelConfig(input=InputConfig(size=(SIZE, SIZE)))
    )
    return load_model(source, device=torch.device("cpu"), max_batch_rows=ROWS, **options)


@pytest.fixture(scope="module")
def served(archive):
    """As a server loads it, with a slice that one row fills."""
    return loaded(archive, slice_seconds=0.002, most_threads=1)


def maps_of(served, rows: list[tuple[Spec, ...]]) -> dict[tuple[int, int], RawMap]:
    """The maps of one pass by row and spec; amplified work is done to its end."""
    images = torch.randn(len(rows), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found = {}
    works = []
    for event in run_pass(served.pass_model, images, rows):
        if isinstance(event, Mapped):
            assert isinstance(event.result, RawMap), event.result
            found[event.row, event.result.spec_index] = event.result
        elif isinstance(event, Amplification):
            works.append(event)
    for work in works:
        while not work.is_done:
            for result in work.advance():
                found[work.row, result.spec_index] = result
    return found


def spec(layer: str = "layer4", method: str = "grad-cam", index: int = 0, **options) -> Spec:
    """One explanation."""
    return Spec(index=index, method=method, layers=(layer,), **options)


def test_a_form_that_passed_its_trial_serves_and_the_card_tells(served):
    """The archive is folded and laid out channels last; its outputs stay within rounding of the archive's own."""
    plan = served.card.plan

    assert plan.form.startswith("folded, channels last")
    assert plan.speedup > 1.05
    assert 0 < plan.deviation < 1e-4


def test_layers_decide_which_form_runs_a_request(served):
    """The default layer rides the fastest form, others the folded one, convolutions that were folded away the archive's own."""
    is_fused = "fused" in served.card.plan.form

    assert effort_of(served.pass_model, [spec("layer4")]).form == (FUSED if is_fused else REWRITTEN)
    assert effort_of(served.pass_model, [spec("layer4"), spec("layer2", index=1)]).form == REWRITTEN
    assert effort_of(served.pass_model, [spec("layer4.1.conv1")]).form == ORIGINAL
    assert [effort_of(served.pass_model, [spec(layer)]).depth for layer in ("layer4", "layer3", "layer2")] == [1, 2, 3]
    assert effort_of(served.pass_model, []).depth == effort_of(served.pass_model, [spec(method="eigen-cam")]).depth == 0


@pytest.mark.parametrize("layer", ["layer4", "layer2", "layer4.1.conv1"])
def test_every_form_explains_as_the_archive_does(served, layer):
    """A map is that of the archive itself to rounding, whichever form made it."""
    rows = [(spec(layer),)] * 2
    ours = maps_of(served, rows)
    theirs = maps_of(as_loaded(served), rows)

    for place, raw in theirs.items():
        assert np.corrcoef(ours[place].values.ravel(), raw.values.ravel())[0, 1] > 0.99999


def test_every_kind_of_method_works_on_what_serves(served):
    """Gradients back to the input, other rules, windows, ablations and scores of many forwards."""
    budget = {"score-cam": Parameters(channels=4), "ablation-cam": Parameters(channels=4)}
    at_input = ["integrated-gradients", "vanilla-backprop", "guided-backprop", "smoothgrad"]
    specs = [
        Spec(index=index, method=method, layers=(), parameters=Parameters(steps=3, samples=3))
        for index, method in enumerate(at_input)
    ]
    specs += [
        spec(method=method, index=len(specs) + index, parameters=budget.get(method, Parameters()))
        for index, method in enumerate(["score-cam", "ablation-cam", "cam", "shapley-cam", "guided-grad-cam"])
    ]

    assert set(maps_of(served, [tuple(specs)])) == {(0, index) for index in range(len(specs))}


def as_loaded(served):
    """The same without its plan."""
    model = dataclasses.replace(served.pass_model, program=served.pass_model.program.original)
    return dataclasses.replace(served, pass_model=model)


def test_neighbours_of_the_same_form_leave_a_row_its_bits(served):
    """In the folded form, what the others in the batch ask for does not move a bit of a row's map."""
    mine = (spec("layer2"),)
    alone = maps_of(served, [mine, mine, mine, mine])[0, 0]
    others = [(spec("layer1", "layercam"),), (spec("layer4", "grad-cam++"),), (spec("layer3", "eigen-cam"),)]

    assert np.array_equal(alone.values, maps_of(served, [mine, *others])[0, 0].values)


def test_costs_of_every_depth_are_known_from_the_start(served):
    """One row and a full pass, with and without a gradient, and a gradient back to each stage."""
    seen = {(cost.depth, cost.rows) for cost in served.costs}

    assert {(0, 1), (1, 1), (0, ROWS), (1, ROWS)} <= seen
    assert {2, 3, 4} <= {depth for depth, _ in seen}
    assert all(cost.seconds > 0 for cost in served.costs)


def test_chunks_of_amplified_work_fill_the_slice_and_no_more(archive, served):
    """Chunks are powers of two of rows that fit the slice, one at least; a generous slice lets them be as large as passes."""
    generous = loaded(archive, slice_seconds=60.0, most_threads=1)

    assert served.pass_model.pace.chunk_rows == 1
    assert generous.pass_model.pace.chunk_rows is None
    assert generous.card.plan.chunk_rows == ROWS
    assert served.pass_model.pace.tail_rows["layer4"] > served.pass_model.pace.tail_rows["layer1"]


def test_the_same_chunks_give_the_same_map_again(served):
    """An amplified map does not depend on how long chunks took this time."""
    rows = [(spec(method="score-cam", parameters=Parameters(channels=6)),)]

    assert np.array_equal(maps_of(served, rows)[0, 0].values, maps_of(served, rows)[0, 0].values)

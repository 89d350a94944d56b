"""A second derivative leaves the graph to whoever else needs it."""

from __future__ import annotations

import torch

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.passes import Mapped, PassModel, run_pass
from camserve.server.engine.probe import probe
from camserve.server.jobs import ClassIndex, RawMap, Spec, Target, TopClasses
from camserve.server.reference.models import SIDE, Functional


def test_shapley_cam_leaves_the_graph_to_others() -> None:
    """Further classes, layers and rows of a shared pass are differentiated after a ShapleyCAM, with the bits they have alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = EagerProgram(Functional(), device="cpu")
        images = torch.randn(2, 3, SIDE, SIDE)
    report = probe(program, images)
    model = PassModel(program=program, layouts=report.layouts, classes=report.classes)
    curved = Spec(index=0, method="shapley-cam", layers=("stem", "body"), target=Target(about=ClassIndex(0)))
    others = Spec(index=0, method="grad-cam", layers=("body",), target=Target(about=TopClasses(3)))

    def maps(first: tuple[Spec, ...]) -> list[torch.Tensor]:
        events = [event for event in run_pass(model, images, [first, (others,)]) if isinstance(event, Mapped)]
        assert all(isinstance(event.result, RawMap) for event in events)
        return [torch.from_numpy(event.result.values) for event in events if event.row == 1]

    alone = maps(())
    assert 3 == len(alone)
    assert all(torch.equal(one, other) for one, other in zip(maps((curved,)), alone, strict=True))

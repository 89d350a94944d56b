"""The graph that is compiled, before any compiler sees it."""

from __future__ import annotations

import io

import pytest
import torch
from support.nets import FailsOnBrightRows, TinyNet

from camserve.server.engine.compiled import PREDICTED
from camserve.server.engine.compiled_build import explanation_of, traced
from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import ExportProgram
from camserve.server.engine.program import Program, TapName
from camserve.server.engine.script import load_script
from camserve.server.jobs import OutputKind

CPU = torch.device("cpu")
KINDS = ["scripted", "traced", "exported", "eager"]


def program_of(kind: str, module: torch.nn.Module) -> Program:
    """A module as a program of each kind."""
    module = module.eval()
    images = torch.zeros(2, 3, 32, 32)
    if kind == "eager":
        return EagerProgram(module, device=CPU)
    if kind == "exported":
        return ExportProgram(torch.export.export(module, (images,)), device=CPU)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module) if kind == "scripted" else torch.jit.trace(module, images), file)
    file.seek(0)
    return load_script(file, device=CPU)


def explanation(kind: str, module: torch.nn.Module):
    """What is compiled of it."""
    tap = TapName.parse("body")
    return explanation_of(program_of(kind, module), tap, kind=OutputKind.CLASSIFICATION, output_path="")


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_explains_inputs_it_has_not_seen(kind):
    """Traced on zeros, it gives outputs, activation, gradient and classes of other images bit for bit, under `no_grad`."""
    explain = explanation(kind, TinyNet())
    graph = traced(explain, torch.zeros(2, 3, 32, 32), torch.tensor([PREDICTED, PREDICTED]))

    images, classes = (
        torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        torch.tensor([PREDICTED, 3]),
    )
    expected = explain(images, classes)
    with torch.no_grad():
        found = graph(images, classes)

    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert [int(expected[0][0].argmax()), 3] == found[3].tolist()
    assert not any(value.requires_grad for value in found)


@pytest.mark.parametrize("kind", ["scripted", "eager"])
def test_a_program_that_branches_on_its_input_is_refused(kind):
    """What the input of the trace decided is not baked in."""
    with pytest.raises(RuntimeError, match="could not be traced"):
        traced(explanation(kind, FailsOnBrightRows()), torch.zeros(2, 3, 32, 32), torch.tensor([PREDICTED, PREDICTED]))

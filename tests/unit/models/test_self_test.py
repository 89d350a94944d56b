"""A model is refused whose served form explains something else than the model as loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.nets import TinyNet
from support.servers import script_source

from camserve.server.engine.program import Capture
from camserve.server.jobs import OutputKind, Spec
from camserve.server.models.loader import load_model, load_program
from camserve.server.models.self_test import self_test

CPU = torch.device("cpu")
INPUTS = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
SPEC = Spec(index=0, method="grad-cam", layers=("body",))


class Louder:
    """A program whose scores are not quite what they should be."""

    def __init__(self, program: Any) -> None:
        self._program = program

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def capture(self, taps, *inputs, **options) -> Capture:
        """Outputs by a factor."""
        captured = self._program.capture(taps, *inputs, **options)
        return Capture(outputs=captured.outputs * 1.01, activations=captured.activations)


class Misled(Louder):
    """A program whose scores are right and whose gradients are not."""

    def capture(self, taps, *inputs, **options) -> Capture:
        """A gradient that has nothing to do with the scores."""
        captured = self._program.capture(taps, *inputs, **options)
        ((tap, value),) = captured.activations.items()
        value = value.detach().requires_grad_()
        noise = torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(1))
        extra = ((value - value.detach()) * noise).flatten(1).sum(1, keepdim=True)
        return Capture(outputs=captured.outputs.detach() + extra, activations={tap: value})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """TinyNet as an archive."""
    return script_source("tiny", TinyNet(), tmp_path_factory.mktemp("tiny"), default_layer="body")


@pytest.fixture(scope="module")
def model(source):
    """As a server serves it."""
    return load_model(source, device=CPU, max_batch_rows=4)


@pytest.fixture(scope="module")
def program(source):
    """As it was loaded."""
    return load_program(source, CPU)


def test_what_serves_passes_and_the_card_says_so(model, program):
    """The note names method, layer and how alike the maps are."""
    said = "self-test: grad-cam at 'body' is that of the model as loaded (correlation 1.0000)"

    assert said == self_test(model.pass_model, program, INPUTS, SPEC, "body")
    assert any(note.startswith("self-test: ") for note in model.card.notes)


def test_other_scores_are_refused(model, program):
    """A form that computes something else must not serve."""
    changed = dataclasses.replace(model.pass_model, program=Louder(program))

    with pytest.raises(ValueError, match="self-test: scores differ from those of the model as loaded by"):
        self_test(changed, program, INPUTS, SPEC, "body")


def test_another_map_is_refused(model, program):
    """Right scores are not enough."""
    changed = dataclasses.replace(model.pass_model, program=Misled(program))

    with pytest.raises(
        ValueError, match=r"self-test: its grad-cam map at 'body' correlates .* by .* only, less than 0\.999"
    ):
        self_test(changed, program, INPUTS, SPEC, "body")


def test_a_model_that_must_be_told_what_to_explain_is_read(model, program):
    """Its default layer has finite values; a layer that is not there is refused."""
    embedding = dataclasses.replace(model.pass_model, kind=OutputKind.EMBEDDING)

    assert "self-test: 'body' can be read" == self_test(embedding, program, INPUTS, None, "body")
    with pytest.raises(Exception, match="'nowhere' does not exist"):
        self_test(embedding, program, INPUTS, None, "nowhere")

"""The shipped model, through the server, on textures it never saw: right answers, and maps that point at the flaw."""

from __future__ import annotations

import itertools

import pytest

from camserve.client import Spec
from camserve.server.demo import surfaces
from camserve.server.demo.pointing import pointing_hit

COUNT = 200
LABELS = ("good", "scratch", "spot", "crack", "stain")


@pytest.fixture(scope="module")
def answers(client):
    """Held-out surfaces and what the server said of them, over the socket."""
    shown = surfaces.test_set(COUNT, seed=2_000_000)
    specs = [Spec("grad-cam", encoding="float32"), Spec("layercam", encoding="float32")]
    results = client.explain_many((surface.image for surface in shown), model="surface", specs=specs, concurrency=16)
    return list(zip(shown, results, strict=True))


def test_accuracy(answers):
    """At least 95 of 100 held-out pictures get their class."""
    right = sum(result.prediction.label == LABELS[surface.label] for surface, result in answers)

    assert right / COUNT >= 0.95


def test_pointing_game(answers):
    """At least 95 of 100 maps of flawed pictures, right or wrong answer alike, have their peak on the flaw."""
    flawed = [(surface, result) for surface, result in answers if surface.label]
    rates = [
        sum(pointing_hit(result.heatmaps[place].values, surface.mask) for surface, result in flawed) / len(flawed)
        for place in range(2)
    ]

    assert max(rates) >= 0.95


def test_sharing_while_at_it(answers):
    """Sixteen callers at a time were batched."""
    assert max(result.summary.batch_rows for _, result in answers) > 1
    assert len(list(itertools.chain.from_iterable(result.errors for _, result in answers))) == 0

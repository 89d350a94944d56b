"""Real architectures with random weights, in every form, at the layer the server takes by default: every method of one pass.

`write_docs.py` makes the table of docs/conformance.md from what this measures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from contract.conformance import formulas
from contract.conformance.architectures import ARCHITECTURES, Architecture
from contract.conformance.gates import COMPARISONS, Comparison
from contract.conformance.served import Served
from contract.conformance.table import Measured

from camserve.client import Client
from camserve.server.background import BackgroundServer
from camserve.server.cam.methods import METHODS, Need, WorkClass

CLASS = 7
# Their channels' parts have both signs.
CANCELLING = {"grad-cam", "hirescam", "xgrad-cam", "finer-cam", "shapley-cam"}
# What only some architectures can be asked.
GUIDED = {"guided-backprop", "deconvnet", "guided-grad-cam"}


def comparisons(architecture: Architecture, slugs: set[str]) -> list[Comparison]:
    """Those of one pass that the libraries can make of it and that the server offers."""
    return [
        comparison
        for comparison in COMPARISONS
        if (method := METHODS[comparison.asked.method]).work is not WorkClass.AMPLIFIED
        and method.slug in slugs
        and len(comparison.cases[0].layers) == 1
        and not comparison.asked.smoothing
        and comparison.note != "finished"
        and (architecture.has_modules or method.slug not in GUIDED)
        and (architecture.is_affine or method.slug != "fullgrad")
        and not ((architecture.is_fused or architecture.is_flat) and Need.CURVATURE in method.needs)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_served_maps_are_the_libraries(
    serve: Callable[..., BackgroundServer], measured: list[Measured], tmp_path: Path, architecture: Architecture
) -> None:
    """Each within its gate, or within what float32 leaves open where channels cancel."""
    net = architecture.build()
    with Client(serve(architecture.source(net, tmp_path)).target) as client:
        card = client.model(architecture.name)
        offered = {method.method for method in card.methods if method.works}
        served = Served(client=client)
        missed = []
        seen = formulas.witness(architecture.question(net, card.default_layer, CLASS), has_curvature=False)
        question = architecture.question(net, card.default_layer, CLASS)
        for comparison in comparisons(architecture, offered):
            ours = served.map(architecture.name, question, comparison.asked, layers=(card.default_layer,))
            shown = comparison.shown(ours, architecture.side)
            one = Measured(
                library=comparison.library,
                method=comparison.method,
                network=architecture.name,
                difference=comparison.measure(comparison.answer(question), shown),
                limit=comparison.limit,
            )
            measured.append(one)
            slug = comparison.asked.method
            limit = max(one.limit, formulas.rounding(slug, seen)) if slug in CANCELLING else one.limit
            if not one.difference <= limit:
                missed.append(one)

    assert [] == missed
